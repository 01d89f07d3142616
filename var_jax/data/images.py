"""Image files to uint8 RGB arrays, and uint8 arrays to what a network sees (and back).

Nothing here reads or changes PIL's global switches: the limits hold whatever else runs in the process.
"""

import io
import math
import pathlib
import struct

import numpy as np
from PIL import (BmpImagePlugin, GifImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, PpmImagePlugin,
                 TiffImagePlugin, WebPImagePlugin)

from var_jax.errors import UserError

MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; the size at which PIL too refuses by default
ORIENTATION = 0x0112  # EXIF tag
PNG = b'\x89PNG\r\n\x1a\n'
# The decoders are called directly: PIL.Image.open would warn through process-wide state and try other formats.
DECODERS = (
    (b'\xff\xd8\xff', JpegImagePlugin.JpegImageFile),
    (PNG, PngImagePlugin.PngImageFile),
    (b'RIFF', WebPImagePlugin.WebPImageFile),
    (b'BM', BmpImagePlugin.BmpImageFile),
    (b'GIF8', GifImagePlugin.GifImageFile),
    *((mark, TiffImagePlugin.TiffImageFile) for mark in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')),
    *((b'P%d' % kind, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)
FORMATS = 'JPEG, PNG or WebP, nor a BMP, GIF, TIFF or PPM'
HEADER = 2**16  # bytes in which a file says its size, as a rule
TEXTS = (b'iCCP', b'tEXt', b'zTXt', b'iTXt')  # chunks of a PNG that say nothing about its pixels


class UnreadableImage(UserError):
  """An image that cannot be decoded; the message names it and the reason."""


def read_image(source, *, size=None, name=None):
  """Decodes an image file (see DECODERS; told by content, not by suffix) to uint8 (H, W, 3) RGB: its first frame.

  source: path or bytes; name: what errors call it. EXIF orientation is applied, transparency is composited on white,
  greyscale of 16 bits or floats is scaled to 8 bits. With `size` = (height, width), a JPEG may be decoded at 1/2, 1/4
  or 1/8 scale as long as it stays at least that large: faster, but not the pixels that the full decode followed by
  `fit` would give. Raises UnreadableImage for anything else: missing, truncated, not an image, more than MAX_PIXELS in
  its header.
  """
  return _decoded(source, name, lambda image: np.array(_rgb(image)), size)


def read_mask(source, *, name=None):
  """(H, W) bool of a black and white image file: True where it is white.

  Of a file that holds two values alone, the larger is white: masks are often stored as 0 and 1, or by a palette. Raises
  UnreadableImage as `read_image`, also for transparent pixels.
  """
  return _decoded(source, name, _white, opaque=True)


def header_size(path):
  """(height, width) that a file's header tells, orientation applied; None where it tells none."""
  try:
    with open(path, 'rb') as file, _open(file.read(HEADER)) as image:
      return image.size if _orientation(image) >= 5 else image.size[::-1]
  except Exception:  # decoders fail in every way there is on broken files
    return None


def _decoded(source, name, convert, size=None, opaque=False):
  """convert(PIL image, upright) of a file. UnreadableImage for whatever hinders that."""
  name = name or (f'{len(source)} bytes' if isinstance(source, bytes) else str(source))
  try:
    data = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
    try:
      return _converted(data, convert, size, opaque)
    except Exception:
      bare = _without_texts(data)
      if bare == data:
        raise
      return _converted(bare, convert, size, opaque)
  except MemoryError:
    raise
  except Exception as error:  # decoders fail in every way there is on broken files
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    raise UnreadableImage(f'cannot read image {name}: {why}; replace or remove it') from error


def _converted(data, convert, size, opaque):
  """convert(PIL image, decoded and turned) of a file's bytes."""
  with _open(data) as image:
    if image.width * image.height > MAX_PIXELS:
      raise ValueError(f'{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}')
    turn = _orientation(image)
    if size and image.format == 'JPEG':
      image.draft(None, size if turn >= 5 else size[::-1])  # 5 to 8 swap width and height
    image.load()
    if opaque and image.has_transparency_data and image.convert('RGBA').getextrema()[3][0] < 255:
      raise ValueError('it has transparent pixels, which are neither black nor white')
    return convert(ImageOps.exif_transpose(image) if turn > 1 else image)


def _open(data):
  """PIL image of the bytes, header read, pixels not decoded. Raises ValueError for other formats."""
  for signature, decoder in DECODERS:
    if data.startswith(signature):
      return decoder(io.BytesIO(data))
  raise ValueError(f'not a {FORMATS}' if data else 'empty')


def _without_texts(data):
  """The bytes of a PNG without colour profile and texts, of which PIL takes a megabyte at most; others as they are.

  A short text that may tell the orientation stays.
  """
  if not data.startswith(PNG):
    return data
  parts, start = [PNG], len(PNG)
  while start + 12 <= len(data):
    length, kind = struct.unpack_from('>I4s', data, start)
    chunk = data[start:start + 12 + length]
    tells_orientation = chunk[8:].startswith((b'Raw profile type exif', b'XML:com.adobe.xmp')) and length < HEADER
    if kind not in TEXTS or tells_orientation:
      parts.append(chunk)
    start += 12 + length
  return b''.join(parts)


def _orientation(image):
  """EXIF orientation 1 to 8; 1 where the EXIF block itself is damaged, which spoils no pixel."""
  try:
    turn = image.getexif().get(ORIENTATION, 1)
  except Exception:
    return 1
  return turn if turn in range(1, 9) else 1


def _rgb(image):
  """Any PIL mode that the formats give -> mode RGB."""
  if image.mode.startswith(('I', 'F')):
    return _grey(image).convert('RGB')
  if image.has_transparency_data:
    rgba = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')


def _grey(image):
  """Greyscale of more than 8 bits, which PIL's own conversion clips at 255 -> mode L.

  Whole numbers are of 16 bits, floats in [0, 1]; those stored in 32 bits may be of 8 bits as well. Raises ValueError
  for others.
  """
  values = np.asarray(image).astype(np.float32)
  least, most = values.min(), values.max()
  limit = 1 if image.mode == 'F' and most <= 1 else 255 if image.mode in 'IF' and most <= 255 else 65535
  if not (np.isfinite(values).all() and 0 <= least and most <= limit):
    raise ValueError(f'its values lie in {least:g} to {most:g}: store 8 bits')
  grey = np.rint(values / np.float32(limit / 255)).astype(np.uint8)
  clear = image.info.get('transparency')
  if isinstance(clear, int):
    grey[values == clear] = 255
  return Image.fromarray(grey)


def _white(image):
  """(H, W) bool of a PIL image, see `read_mask`."""
  deep = image.mode.startswith(('I', 'F'))
  values = np.array(image if deep else _rgb(image)).reshape(image.height, image.width, -1).mean(axis=-1)
  found = np.unique(values)
  if len(found) <= 2 and (len(found) == 2 or found[0] == 1):
    return values == found[-1]
  return (np.array(_grey(image)) if deep else values) > 127


def fit(image, size, *, enlarge=1.125, rng=None, flip=False):
  """The published augmentation: uint8 (H, W, 3) -> uint8 (h, w, 3) with size = (h, w).

  Lanczos to the smallest image that covers round(enlarge * size) with the aspect kept, then a crop of `size`: uniform
  with the NumPy Generator `rng`, central without. `flip` mirrors half of the images; it needs an rng.
  Raises UserError for enlarge < 1, UnreadableImage for an image so narrow that covering takes more than MAX_PIXELS.
  """
  if enlarge < 1:
    raise UserError(f'enlarge={enlarge} would make the image smaller than the crop: use 1 or more')
  height, width = size
  cover = _covering(image.shape[:2], (round(enlarge * height), round(enlarge * width)))
  spare_y, spare_x = cover[0] - height, cover[1] - width
  if rng is None:
    y, x = round(spare_y / 2), round(spare_x / 2)
  else:
    y, x = rng.integers(spare_y + 1), rng.integers(spare_x + 1)
  image = _resized_crop(image, cover, (y, x), size)
  if flip and rng is not None and rng.random() < 0.5:
    image = image[:, ::-1]
  return image


def _covering(old, size):
  """(h, w) of the image of this aspect of which one edge equals that of size, the other is as long (rounded down)."""
  (old_h, old_w), (h, w) = old, size
  if h * old_w >= w * old_h:
    w = old_w * h // old_h
  else:
    h = old_h * w // old_w
  if (h, w) != (old_h, old_w) and h * w > MAX_PIXELS:
    raise UnreadableImage(f'an image of {old_w}x{old_h} is too narrow to be enlarged to {w}x{h}: crop or remove it')
  return h, w


def _resized_crop(image, new, corner, size):
  """The crop of `size` at `corner` of the image resized by Lanczos to `new` = (h, w); little else of that is made."""
  old, (y, x), (height, width) = image.shape[:2], corner, size
  if new == old:
    return image[y:y + height, x:x + width]
  top, bottom = _exact_edges(old[0], new[0], y, y + height)
  left, right = _exact_edges(old[1], new[1], x, x + width)
  if _columns_first(old, (bottom - top, right - left)) != _columns_first(old, new):
    (top, left), (bottom, right) = (0, 0), new
  box = (left * old[1] / new[1], top * old[0] / new[0], right * old[1] / new[1], bottom * old[0] / new[0])
  part = Image.fromarray(image).resize((right - left, bottom - top), Image.Resampling.LANCZOS, box)
  return np.asarray(part)[y - top:y - top + height, x - left:x - left + width]


def _exact_edges(old, new, start, stop):
  """The closest (start, stop) around those of `new` pixels that lie at a binary fraction of the `old` ones.

  PIL takes edges in float32; at others some pixels would differ by one from those of the whole image.
  """
  step = new // math.gcd(old, new)
  step //= step & -step
  return start // step * step, -(-stop // step) * step


def _columns_first(old, new):
  """Whether Pillow 13 resizes columns before rows, as none did before: pixels clipped in between depend on it."""
  return old[0] - new[0] > max(0, 2 * (old[1] - new[1]))


def to_float(image, out=None):
  """uint8 (..., 3) in 0..255 -> float32 in [-1, 1], in `out` if there is one."""
  floats = np.empty(np.shape(image), np.float32) if out is None else out
  floats[...] = image
  floats /= np.float32(127.5)
  floats -= np.float32(1)
  return floats


def to_uint8(image):
  """float (..., 3) in [-1, 1] -> uint8 in 0..255, rounded and clipped: the inverse of `to_float`."""
  return np.clip(np.rint((np.asarray(image, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
