"""Pictures to look at: tiles in a grid, enlarged where they are small."""

import numpy as np
from PIL import Image


LEAST, GAP = 64, 2  # pixels


def names(count, start=0):
  """Names of the files of images `start` to start + count - 1 in a folder: '000000', ..."""
  return [f'{i:06d}' for i in range(start, start + count)]


def grid(tiles_RxCxHxWx3, least=LEAST, gap=GAP):
  """(rows, columns, H, W, 3) uint8 -> one (height, width, 3) picture; tiles under `least` pixels are enlarged."""
  rows, columns, height, width, _ = tiles_RxCxHxWx3.shape
  zoom = max(1, -(-least // height))
  tiles = tiles_RxCxHxWx3.repeat(zoom, axis=2).repeat(zoom, axis=3)
  margins = ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0))
  tiles = np.pad(tiles, margins, constant_values=255)
  return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * (height * zoom + 2 * gap), -1, 3)


def sheet(images_NxHxWx3, rows=0):
  """(N, H, W, 3) uint8 -> one picture, nearly square and in reading order.

  rows: or so many, where images come in turn for each: a row for each class, of labels 0, 1, 2, 0, 1, 2, ...
  """
  count = len(images_NxHxWx3)
  in_turn, (rows, columns) = bool(rows), _shape(count, rows)
  blank = np.full((rows * columns - count, *images_NxHxWx3.shape[1:]), 255, np.uint8)
  tiles = np.concatenate([images_NxHxWx3, blank])
  shape = (columns, rows) if in_turn else (rows, columns)
  tiles = tiles.reshape(*shape, *images_NxHxWx3.shape[1:])
  return grid(tiles.swapaxes(0, 1) if in_turn else tiles)


def sheet_size(count, size, rows=0):
  """(height, width) in pixels of the `sheet` of so many images of size (h, w)."""
  zoom = max(1, -(-LEAST // size[0]))
  return tuple(many * (side * zoom + 2 * GAP) for many, side in zip(_shape(count, rows), size))


def _shape(count, rows):
  columns = -(-count // rows) if rows else int(np.ceil(np.sqrt(count)))
  return rows or -(-count // columns), columns


def outlined(image_HxWx3, inside_HxW, colour=(255, 0, 0)):
  """The image with the edge of a part of it (bool) in a colour: the part's pixels that have a side outside."""
  around = np.pad(inside_HxW, 1)
  whole = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
  return np.where((inside_HxW & ~whole)[..., None], np.uint8(colour), image_HxWx3)


def save(path, image_HxWx3):
  """Writes one uint8 picture; the suffix says the format."""
  Image.fromarray(image_HxWx3).save(path)


def plot(path, lines, x, y):
  """Writes a picture. lines: {label: [(x, y), ...]}, '' for the label of one alone; x, y: what the axes show."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), dpi=120, layout='constrained')
  ax = figure.subplots()
  for label, line in lines.items():
    ax.plot(*zip(*line), marker='.', label=label)
  if any(lines):
    ax.legend(fontsize=7)
  ax.set_xlabel(x)
  ax.set_ylabel(y)
  ax.grid(alpha=0.3)
  FigureCanvasAgg(figure).print_png(str(path))


def scales_figure(images_NxHxWx3, tokens_NxL, scales_NxKxHxWx3, pyramid):
  """What every scale adds, as one (height, width, 3) picture: the image, its token maps, the picture after each scale.

  Colours of the token maps tell codes apart and mean nothing else.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows, columns = 2 * len(images_NxHxWx3), len(pyramid) + 1
  figure = Figure(figsize=(1.1 * columns, 1.1 * rows + 0.3), dpi=100, layout='constrained')
  canvas, axes = FigureCanvasAgg(figure), figure.subplots(rows, columns, squeeze=False)
  colours = np.random.default_rng(0).permutation(max(int(tokens_NxL.max()) + 1, 2))
  for ax in axes.ravel():
    ax.set_axis_off()
  for n, image in enumerate(images_NxHxWx3):
    axes[2 * n, 0].imshow(image)
    for k, tokens in enumerate(pyramid.split(tokens_NxL[n:n + 1])):
      token_map = colours[tokens[0].reshape(pyramid.scales[k])]
      axes[2 * n, k + 1].imshow(token_map, cmap='turbo', vmin=0, vmax=len(colours))
      axes[2 * n + 1, k + 1].imshow(scales_NxKxHxWx3[n, k])
  axes[0, 0].set_title('image', fontsize=8)
  for k, (height, width) in enumerate(pyramid.scales):
    axes[0, k + 1].set_title(f'{height}x{width} tokens', fontsize=8)
    axes[1, k + 1].set_title('picture so far', fontsize=8)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
