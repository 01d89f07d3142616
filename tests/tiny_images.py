"""Small images, files and sources of numbered images, shared by the tests of the data room."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from var_jax.data.arrays import ArraySource
from var_jax.data.images import UnreadableImage

RED = (255, 0, 0)


def encoded(image, form='PNG', **options):
  """Bytes of a PIL image or array as a file."""
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_with_header(width, height):
  """A PNG whose header promises width x height and whose data is next to nothing."""
  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def numbered(count, size=4):
  """Source whose image i has the value i % 256 everywhere and the label i."""
  pixels = np.arange(count, dtype=np.uint8)[:, None, None, None]
  pixels = np.broadcast_to(pixels, (count, size, size, 3))
  return ArraySource(pixels, np.arange(count), tuple(str(i) for i in range(count)))


class Broken:
  """A source of which some images cannot be read."""
  class_names = ('a',)

  def __init__(self, count, bad):
    self.count = self.total = count
    self.bad = set(bad)

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.bad:
      raise UnreadableImage(f'cannot read image {index}.jpg: torn')
    return np.full((4, 4, 3), index % 256, np.uint8), index


def take(batches, count):
  found = [next(batches) for _ in range(count)]
  batches.close()
  return found


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])
