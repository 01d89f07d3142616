"""Files of a data set with bits turned, parts cut out and bytes put in: pixels, or one line that says what to do."""

import gzip
import io
import json

import hypothesis
import numpy as np
import pytest
from PIL import Image
from tiny_images import RED, encoded, noise

from var_jax import workdir as workdir_lib
from var_jax.data import images, sources, tokens
from var_jax.data.images import UnreadableImage, read_image, read_mask
from var_jax.errors import UserError

given, st = hypothesis.given, hypothesis.strategies

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
many = hypothesis.settings(
    max_examples=2000, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate])


def mutated(valid):
  """Strategy: the bytes of a valid file, changed in one to four places."""
  place = st.integers(0, len(valid))
  change = st.one_of(
      st.tuples(place, st.just(1), st.integers(0, 255).map(lambda byte: bytes([byte]))),  # another byte
      st.tuples(place, st.just(4), st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1]).map(lambda n: n.to_bytes(4, 'big'))),
      st.tuples(place, st.integers(1, len(valid)), st.just(b'')),                         # a part cut out
      st.tuples(place, st.just(0), st.binary(min_size=1, max_size=16)))                   # bytes put in

  def apply(changes):
    data = valid
    for start, removed, added in changes:
      data = data[:start] + added + data[start + removed:]
    return data

  return st.lists(change, min_size=1, max_size=4).map(apply)


def read_or_refused(read, *kinds):
  """What read() returns; None where it raises one of the kinds, in one line."""
  try:
    return read()
  except kinds as error:
    assert str(error) and '\n' not in str(error)
    return None


def valid_images():
  rgb, palette = noise(9, 7, 3), Image.fromarray(noise(9, 7) % 4, 'P')
  palette.putpalette([0, 0, 0, *RED, 0, 0, 255, 9, 9, 9])
  exif = Image.Exif()
  exif[images.ORIENTATION] = 6
  kinds = {form.lower(): encoded(rgb, form) for form in ('BMP', 'GIF', 'TIFF', 'PPM', 'WEBP')}
  return kinds | {
      'jpeg': encoded(rgb, 'JPEG', exif=exif), 'png': encoded(rgb, exif=exif, icc_profile=bytes(99)),
      'png16': encoded(noise(9, 7).astype(np.uint16) * 257), 'png_palette': encoded(palette, transparency=2),
      'tiff_float': encoded(noise(9, 7) / np.float32(255), 'TIFF'),
      'tiff_packed': encoded(rgb, 'TIFF', compression='tiff_lzw'), 'cmyk': encoded(Image.new('CMYK', (9, 7)), 'JPEG')}


IMAGES = valid_images()


@pytest.mark.parametrize('kind', IMAGES)
def test_spoiled_images_give_pixels_or_one_line(kind):
  @many
  @given(mutated(IMAGES[kind]))
  def check(data):
    image = read_or_refused(lambda: read_image(data, name='x'), UnreadableImage)
    assert image is None or image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    mask = read_or_refused(lambda: read_mask(data, name='x'), UnreadableImage)
    assert mask is None or mask.dtype == bool and mask.ndim == 2

  check()


def opened(source):
  """Goes through a source as training does."""
  assert len(source) and source.total >= len(source) and len(source.class_names) > source.labels.max()
  for index in (0, len(source) - 1):
    image, _ = source[index]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
  assert sources.summary(source, source)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_spoiled_npz_files_give_images_or_one_line(save, tmp_path):
  buffer = io.BytesIO()
  save(buffer, x_train=noise(6, 3, 3), y_train=np.arange(6) % 3, x_test=noise(3, 3, 3), y_test=np.arange(3),
       class_names=['a', 'b', 'c'])

  @many
  @given(mutated(buffer.getvalue()))
  def check(data):
    (tmp_path / 'a.npz').write_bytes(data)
    for split in sources.SPLITS:
      read_or_refused(lambda: opened(sources.open_source('arrays', tmp_path / 'a.npz', split)), UserError)

  check()


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name', ['train-images-idx3-ubyte', 't10k-labels-idx1-ubyte'])
def test_spoiled_idx_files_give_images_or_one_line(name, packed, tmp_path):
  files = {}
  for part, count in (('train', 6), ('t10k', 3)):
    for what, array in (('images-idx3', noise(count, 3, 3)), ('labels-idx1', np.arange(count, dtype=np.uint8))):
      header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
      files[f'{part}-{what}-ubyte'] = header + array.tobytes()
      (tmp_path / f'{part}-{what}-ubyte').write_bytes(files[f'{part}-{what}-ubyte'])
  valid = gzip.compress(files[name], mtime=0) if packed else files[name]
  if packed:
    (tmp_path / name).unlink()

  @many
  @given(mutated(valid))
  def check(data):
    (tmp_path / f'{name}{".gz" if packed else ""}').write_bytes(data)
    for split in sources.SPLITS:
      read_or_refused(lambda: opened(sources.open_source('arrays', tmp_path, split)), UserError)

  check()


@pytest.mark.parametrize('file', ['tokens.json', 'train-00000-of-00001.array_record'])
def test_spoiled_tokens_give_tokens_or_one_line(file, tmp_path):
  made = {'tokenizer': 'abc', 'codes': 9, 'scales': [[1, 1], [2, 2]], 'crops': 2, 'seed': 0, 'enlarge': 1.125,
          'flip': False, 'images': 'abc', 'classes': ['a', 'b'], 'train': 6, 'validation': 2}
  tokens.describe(tmp_path, made)
  rng = np.random.default_rng(0)
  for split, count, crops in (('train', 6, 2), ('validation', 2, 1)):
    rows = [(rng.integers(0, 9, (crops, 5)), i % 2) for i in range(count)]
    tokens.write_shard(tmp_path / tokens.shard_names(split, count)[0], rows, 9)
  valid = (tmp_path / file).read_bytes()

  def read():
    source = tokens.TokenSource(tmp_path, 'train')
    for index in range(len(source)):
      tokens_CxL, label = source[index]
      assert tokens_CxL.dtype == np.int32 and tokens_CxL.ndim == 2 and 0 <= label
    assert sources.summary(source, source)

  @many
  @given(mutated(valid))
  def check(data):
    (tmp_path / file).write_bytes(data)
    read_or_refused(read, UserError)

  check()


def test_spoiled_class_names_are_names_or_one_line(tmp_path):
  @many
  @given(mutated(json.dumps(['cat', 'd\u00f6g', '10'], indent=2).encode()))
  def check(data):
    (tmp_path / 'classes.json').write_bytes(data)
    names = read_or_refused(lambda: workdir_lib.class_names(tmp_path), UserError)
    assert names is None or all(isinstance(name, str) for name in names)

  check()
