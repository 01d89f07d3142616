"""Pictures to look at: tiles in a grid, enlarged where they are small."""

import numpy as np
from PIL import Image


def grid(tiles_RxCxHxWx3, least=64, gap=2):
  """(rows, columns, H, W, 3) uint8 -> one (height, width, 3) picture; tiles under `least` pixels are enlarged."""
  rows, columns, height, width, _ = tiles_RxCxHxWx3.shape
  zoom = max(1, -(-least // height))
  tiles = tiles_RxCxHxWx3.repeat(zoom, axis=2).repeat(zoom, axis=3)
  margins = ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0))
  tiles = np.pad(tiles, margins, constant_values=255)
  return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * (height * zoom + 2 * gap), -1, 3)


def sheet(images_NxHxWx3, columns=0):
  """(N, H, W, 3) uint8 in reading order -> one picture, nearly square unless `columns` says otherwise."""
  count = len(images_NxHxWx3)
  columns = columns or int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  blank = np.full((rows * columns - count, *images_NxHxWx3.shape[1:]), 255, np.uint8)
  return grid(np.concatenate([images_NxHxWx3, blank]).reshape(rows, columns, *images_NxHxWx3.shape[1:]))


def save(path, image_HxWx3):
  """Writes one uint8 picture; the suffix says the format."""
  Image.fromarray(image_HxWx3).save(path)
