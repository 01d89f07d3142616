"""Images, sources and batches: what is read is what the file shows, and batch b is the same whoever asks for it."""

import gzip
import io
import json
import pickle
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from var_jax.data import images, sources
from var_jax.data.images import UnreadableImage, fit, read_image, to_float, to_uint8
from var_jax.data.pipeline import eval_batches, train_batches
from var_jax.data.sources import ArraySource, open_source
from var_jax.errors import UserError

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
  class_names, num_classes = ('a',), 1

  def __init__(self, count, bad):
    self.count, self.bad = count, set(bad)

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


# Images


def test_lossless_files_are_read_pixel_by_pixel(tmp_path):
  rgb = noise(5, 7, 3)
  path = tmp_path / 'a.png'
  path.write_bytes(encoded(rgb))
  for source in (path, str(path), encoded(rgb), encoded(rgb, 'WEBP', lossless=True)):
    image = read_image(source)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)
  smooth = np.full((16, 24, 3), (200, 100, 50), np.uint8)
  np.testing.assert_allclose(read_image(encoded(smooth, 'JPEG', quality=95)), smooth, atol=4)


def test_grey_becomes_three_equal_channels():
  grey = noise(6, 5)
  for data in (encoded(grey), encoded(Image.fromarray(grey).convert('1').convert('L'))):
    image = read_image(data)
    assert image.shape == (6, 5, 3)
    assert (image == image[..., :1]).all()
  np.testing.assert_array_equal(read_image(encoded(grey))[..., 0], grey)
  np.testing.assert_array_equal(read_image(encoded(Image.new('1', (3, 2), 1))), np.full((2, 3, 3), 255))


def test_palettes_show_their_colours_and_transparency_shows_white():
  palette = Image.new('P', (4, 2), 1)
  palette.putpalette([0, 0, 0, *RED, 0, 0, 255])
  palette.putpixel((3, 0), 2)
  image = read_image(encoded(palette))
  assert tuple(image[1, 1]) == RED and tuple(image[0, 3]) == (0, 0, 255)
  image = read_image(encoded(palette, transparency=2))
  assert tuple(image[1, 1]) == RED and tuple(image[0, 3]) == (255, 255, 255)
  image = read_image(encoded(palette, transparency=bytes([255, 0, 255])))
  assert tuple(image[1, 1]) == (255, 255, 255) and tuple(image[0, 3]) == (0, 0, 255)


def test_alpha_is_composited_on_white():
  for mode, colour, wanted in (('RGBA', (200, 0, 0, 51), (244, 204, 204)), ('LA', (0, 0), (255, 255, 255))):
    np.testing.assert_allclose(read_image(encoded(Image.new(mode, (3, 3), colour)))[1, 1], wanted, atol=1)
  assert tuple(read_image(encoded(Image.new('RGB', (2, 2), RED), transparency=RED))[0, 0]) == (255, 255, 255)


def test_cmyk_jpegs_become_rgb():
  cyan = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
  np.testing.assert_allclose(read_image(encoded(cyan, 'JPEG', quality=95))[8, 8], (0, 255, 255), atol=4)
  black = Image.new('CMYK', (16, 16), (0, 0, 0, 255))
  np.testing.assert_allclose(read_image(encoded(black, 'JPEG', quality=95))[8, 8], (0, 0, 0), atol=4)
  # YCCK, as Photoshop writes it: PIL stores the inverse of what it is given, here luma 200, no chroma, no black.
  data = bytearray(encoded(Image.new('CMYK', (16, 16), (55, 127, 127, 0)), 'JPEG', quality=100))
  adobe = data.index(b'Adobe')
  data[adobe + 11] = 2  # the transform of the Adobe marker: the components are YCCK, not CMYK
  np.testing.assert_allclose(read_image(bytes(data))[8, 8], (55, 55, 55), atol=4)


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.array([[0, 257, 25700], [32768, 65278, 65535]], np.uint16)
  data = encoded(values)
  with Image.open(io.BytesIO(data)) as image:
    assert image.mode.startswith('I')
  np.testing.assert_array_equal(read_image(data)[..., 1], [[0, 1, 100], [128, 254, 255]])
  np.testing.assert_array_equal(images._rgb(Image.fromarray(values.astype(np.int32))), read_image(data))


@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_orientation_is_applied_and_draft_keeps_it(turn):
  upright = np.zeros((32, 64, 3), np.uint8)
  upright[:16, :32] = RED  # top left
  ways = Image.Transpose
  stored = Image.fromarray(upright)
  if turn > 1:
    stored = stored.transpose({2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE,
                               6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270}[turn])
  exif = Image.Exif()
  exif[images.ORIENTATION] = turn
  data = encoded(stored, 'JPEG', quality=95, subsampling=0, exif=exif)
  np.testing.assert_allclose(read_image(data), upright, atol=8)
  half = read_image(data, size=(16, 30))
  assert half.shape == (16, 32, 3)
  np.testing.assert_allclose(half, upright[::2, ::2], atol=8)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_spoils_no_pixel():
  rgb = noise(8, 8, 3)
  for exif in (b'Exif\0\0broken', b'Exif\0\0II*\0\xff\xff\xff\xff'):
    np.testing.assert_array_equal(read_image(encoded(rgb, exif=exif)), rgb)


def test_broken_files_say_which_and_why(tmp_path):
  whole = {form: encoded(noise(64, 64, 3), form) for form in ('JPEG', 'PNG', 'WEBP')}
  cases = {f'torn_{form}': data[:len(data) // 2] for form, data in whole.items()}
  cases |= {'empty': b'', 'text': b'hello', 'riff': b'RIFF....WAVEfmt ', 'head': whole['PNG'][:20]}
  for name, data in cases.items():
    path = tmp_path / f'{name}.jpg'
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=f'{name}.jpg: .+; replace'):
      read_image(path)
  for data, why in ((b'hello', '5 bytes: not a JPEG, PNG or WebP'), (b'', 'empty')):
    with pytest.raises(UnreadableImage, match=why):
      read_image(data)
  with pytest.raises(UnreadableImage, match='gone.png: No such file'):
    read_image(tmp_path / 'gone.png')
  assert issubclass(UnreadableImage, UserError)
  assert 'torn' in str(pickle.loads(pickle.dumps(UnreadableImage('torn'))))


@pytest.mark.filterwarnings('error')
def test_size_is_judged_by_the_header_alone(monkeypatch):
  with pytest.raises(UnreadableImage, match='30000x30000 pixels are more'):
    read_image(png_with_header(30000, 30000))
  with pytest.raises(UnreadableImage, match='truncated'):  # below the limit: decoded, without PIL's warning
    read_image(png_with_header(10000, 9500))
  monkeypatch.setattr(images, 'MAX_PIXELS', 63)
  with pytest.raises(UnreadableImage, match='8x8'):
    read_image(encoded(noise(8, 8, 3)))


def test_fit_is_lanczos_to_an_eighth_more_then_a_crop():
  image = noise(50, 80, 3)
  wide = np.asarray(Image.fromarray(image).resize((28, 18), Image.Resampling.LANCZOS))  # 80 * 18 / 50 = 28.8
  np.testing.assert_array_equal(fit(image, (16, 16)), wide[1:17, 6:22])
  for seed in range(20):
    crop = fit(image, (16, 16), rng=np.random.default_rng(seed))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (16, 16, 3)).reshape(-1, 16, 16, 3)
    assert (windows == crop).all((1, 2, 3)).any()
    np.testing.assert_array_equal(crop, fit(image, (16, 16), rng=np.random.default_rng(seed)))
  assert len({fit(image, (16, 16), rng=np.random.default_rng(seed)).tobytes() for seed in range(20)}) > 10


def test_fit_covers_any_shape_and_leaves_exact_ones_alone():
  for shape in ((3, 90), (90, 3), (1, 1), (8, 24), (7, 23)):
    for size in ((8, 24), (24, 8), (16, 16)):
      assert fit(noise(*shape, 3), size).shape == (*size, 3)
  image = noise(16, 32, 3)
  np.testing.assert_array_equal(fit(image, (16, 32), enlarge=1), image)
  resized = np.asarray(Image.fromarray(image).resize((16, 8), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(fit(image, (8, 16), enlarge=1, rng=np.random.default_rng(0)), resized)
  with pytest.raises(UserError, match='enlarge=0.9'):
    fit(image, (8, 8), enlarge=0.9)
  with pytest.raises(UnreadableImage, match='too narrow'):
    fit(np.zeros((1, 10000, 3), np.uint8), (256, 256))


def test_half_of_the_images_are_mirrored():
  image = noise(8, 8, 3)
  seen = [fit(image, (8, 8), enlarge=1, rng=np.random.default_rng(seed), flip=True) for seed in range(200)]
  mirrored = [(one == image[:, ::-1]).all() for one in seen]
  assert all(flipped or (one == image).all() for flipped, one in zip(mirrored, seen))
  assert 70 < sum(mirrored) < 130
  assert (fit(image, (8, 8), enlarge=1, flip=True) == image).all()


def test_bytes_survive_the_way_to_floats_and_back():
  values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
  floats = to_float(values)
  assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
  np.testing.assert_array_equal(to_uint8(floats), values)
  np.testing.assert_array_equal(to_uint8([-3.0, 0.999, 5.0]), [0, 255, 255])


# Sources


def make_folder(root, classes, count, start=0, suffix='.png'):
  """Images of distinct colours in root/CLASS; returns root."""
  for name in classes:
    (root / name / 'nested').mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
      path = root / name / ('nested' if i % 2 else '') / f'{i}{suffix}'
      path.write_bytes(encoded(np.full((6, 6, 3), i, np.uint8), 'JPEG' if 'jp' in suffix.lower() else 'PNG'))
  return root


def test_folder_classes_are_sorted_and_every_suffix_counts(tmp_path):
  root = tmp_path / 'train'
  make_folder(root, ['cat', 'ant', 'elk', 'bee'], 2)  # no file system lists these in order by accident of creation
  make_folder(root, ['ant'], 1, start=50, suffix='.JPEG')
  (root / 'ant' / '._0.png').write_bytes(b'left by macOS')
  (root / 'ant' / 'notes.txt').write_text('no image')
  make_folder(tmp_path / 'val', ['cat', 'ant', 'elk', 'bee'], 1, start=9)
  train, val = (pickle.loads(pickle.dumps(open_source('folder', tmp_path, split))) for split in sources.SPLITS)
  assert train.class_names == ('ant', 'bee', 'cat', 'elk') and train.num_classes == 4
  assert [train[i][1] for i in range(len(train))] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
  assert [val[i][1] for i in range(len(val))] == [0, 1, 2, 3]
  image, label = val[1]
  assert label == 1 and (image == 9).all()


def test_held_out_images_are_disjoint_complete_and_independent_of_listing(tmp_path, monkeypatch):
  make_folder(tmp_path / 'a', ['x', 'y'], 40)
  make_folder(tmp_path / 'b' / 'train', ['y', 'x'], 40)  # the same names below another root
  make_folder(tmp_path / 'a', ['few'], 3)
  make_folder(tmp_path / 'b' / 'train', ['few'], 3)
  train, val = (open_source('folder', tmp_path / 'a', split) for split in sources.SPLITS)
  assert not set(train.names) & set(val.names)
  assert len(set(train.names) | set(val.names)) == 83
  assert np.bincount(val.labels).tolist() == [1, 2, 2]
  walk = sources.os.walk
  monkeypatch.setattr(sources.os, 'walk', lambda top: ((a, b, c[::-1]) for a, b, c in walk(top)))
  assert open_source('folder', tmp_path / 'b', 'validation').names == val.names


def test_a_single_image_stays_in_training(tmp_path):
  make_folder(tmp_path, ['x'], 1)
  make_folder(tmp_path, ['y'], 2)
  train, val = (open_source('folder', tmp_path, split) for split in sources.SPLITS)
  assert train.labels.tolist() == [0, 1] and val.labels.tolist() == [1]


def test_folder_errors_name_the_folder_and_the_way_out(tmp_path):
  def fails(path, match, split='train'):
    with pytest.raises(UserError, match=match) as caught:
      open_source('folder', path, split)
    assert '\n' not in str(caught.value)
  fails(tmp_path / 'gone', 'no data at .*gone')
  (tmp_path / 'flat').mkdir()
  (tmp_path / 'flat' / 'a.png').write_bytes(encoded(noise(4, 4, 3)))
  fails(tmp_path / 'flat', 'no class folders in .*flat: sort')
  fails(tmp_path / 'flat' / 'a.png', 'is a file: give a folder')
  make_folder(tmp_path / 'hole', ['x'], 2)
  (tmp_path / 'hole' / 'empty').mkdir()
  fails(tmp_path / 'hole', 'no images .* in .*hole/empty: add some or remove')
  make_folder(tmp_path / 'odd' / 'train', ['x'], 2)
  make_folder(tmp_path / 'odd' / 'val', ['x', 'extra'], 1)
  fails(tmp_path / 'odd', r'differ in classes \(extra\)', 'validation')
  make_folder(tmp_path / 'lone' / 'val', ['x'], 1)
  fails(tmp_path / 'lone', 'has no train/ beside it')
  make_folder(tmp_path / 'one', ['x'], 1)
  fails(tmp_path / 'one', 'has one image, none can be held out', 'validation')


def test_digits_are_1500_and_297_different_ones():
  train, val = (open_source('digits', split=split) for split in sources.SPLITS)
  assert (len(train), len(val), train.num_classes) == (1500, 297, 10)
  assert set(val.labels.tolist()) == set(range(10))
  assert train[0][0].shape == (8, 8, 3) and train.images.min() == 0 and train.images.max() == 255
  from sklearn.datasets import load_digits
  wanted = np.sort(np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64), axis=0)
  both = np.concatenate([train.images, val.images]).reshape(1797, 64)
  np.testing.assert_array_equal(np.sort(both, axis=0), wanted)


def write_idx(path, array):
  data = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def test_idx_files_are_read_gzipped_or_not(tmp_path):
  pixels, labels = noise(5, 4, 3), np.array([0, 1, 2, 1, 0], np.uint8)
  write_idx(tmp_path / 'train-images-idx3-ubyte.gz', pixels)
  write_idx(tmp_path / 'train-labels-idx1-ubyte', labels)
  write_idx(tmp_path / 't10k-images-idx3-ubyte', pixels[:2])
  with pytest.raises(UserError, match='no t10k-labels-idx1-ubyte or .*gz in'):
    open_source('arrays', tmp_path)
  write_idx(tmp_path / 't10k-labels-idx1-ubyte.gz', np.array([1, 3], np.uint8))
  train, val = (open_source('arrays', tmp_path, split) for split in sources.SPLITS)
  assert (len(train), len(val), train.num_classes, val.num_classes) == (5, 2, 4, 4)
  np.testing.assert_array_equal(train[2][0], np.stack([pixels[2]] * 3, -1))
  assert train[2][1] == 2 and val[1][1] == 3
  (tmp_path / 't10k-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03short')
  with pytest.raises(UserError, match='cannot read .*t10k-images'):
    open_source('arrays', tmp_path, 'validation')


def test_npz_layouts_and_their_held_out_part(tmp_path):
  pixels, labels = noise(40, 4, 4, 3), np.arange(40) % 7
  for names in (('images', 'labels'), ('arr_0', 'labels'), ('x_train', 'y_train')):
    path = tmp_path / f'{names[0]}.npz'
    np.savez(path, **dict(zip(names, (pixels, labels[:, None]))))
    train, val = (open_source('arrays', path, split) for split in sources.SPLITS)
    assert (len(train), len(val), train.num_classes, val.num_classes) == (38, 2, 7, 7)
    found = {image.tobytes(): label for part in (train, val) for image, label in (part[i] for i in range(len(part)))}
    assert found == {image.tobytes(): label for image, label in zip(pixels, labels)}
  np.savez(path, x_train=pixels[..., 0], y_train=labels, x_test=pixels[:3, ..., :1], y_test=labels[:3])
  train, val = (open_source('arrays', path, split) for split in sources.SPLITS)
  assert (len(train), len(val), val.num_classes) == (40, 3, 7)
  np.testing.assert_array_equal(val[2][0], pixels[2, ..., [0, 0, 0]].transpose(1, 2, 0))


def test_array_errors_say_what_to_store(tmp_path):
  def fails(match, path=tmp_path / 'a.npz', **arrays):
    if arrays:
      np.savez(path, **arrays)
    with pytest.raises(UserError, match=match) as caught:
      open_source('arrays', path)
    assert '\n' not in str(caught.value)
  pixels, labels = noise(4, 2, 2, 3), np.arange(4)
  fails('float64 .* store uint8', images=pixels / 255, labels=labels)
  fails('store uint8', images=pixels[..., :2], labels=labels)
  fails('4 images, labels .* give each', images=pixels, labels=labels[:3])
  fails('give each an int', images=pixels, labels=labels / 2)
  fails('holds images, other: name its arrays', images=pixels, other=labels)
  fails('one image|single image', images=pixels[:1], labels=labels[:1])
  fails('cannot read .* as .npz', images=np.array([{}]), labels=labels)
  (tmp_path / 'text.npz').write_text('text')
  fails('cannot read .*text.npz', path=tmp_path / 'text.npz')
  np.savez(tmp_path / 'whole.npz', images=pixels, labels=labels)
  (tmp_path / 'torn.npz').write_bytes((tmp_path / 'whole.npz').read_bytes()[:-40])
  fails('cannot read .*torn.npz', path=tmp_path / 'torn.npz')
  fails('no data at', path=tmp_path / 'gone.npz')
  fails('apt-get install dataset-fashion-mnist', path='/nowhere/datasets/fashion-mnist')


def test_unknown_kinds_and_missing_packages_are_explained(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='use one of digits, folder, arrays, tfds'):
    open_source('imagenet', tmp_path)
  with pytest.raises(UserError, match='use train or validation'):
    open_source('digits', None, 'test')
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(UserError, match=r"pip install 'var_jax\[tfds\]'"):
    open_source('tfds', tmp_path)


def test_prepared_tfds_data_is_read_without_tensorflow(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_pb2
  features = tfds.features.FeaturesDict({
      'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['cat', 'dog'])})
  features.save_config(tmp_path)
  pixels, splits = noise(5, 6, 7, 3), []
  for split, count in (('train', 5), ('test', 2)):
    writer = ArrayRecordWriter(f'{tmp_path}/toy-{split}.array_record-00000-of-00001', 'group_size:1')
    for i in range(count):
      example = tf_example_pb2.Example()
      example.features.feature['image'].bytes_list.value.append(encoded(pixels[i])[:40 if i == 4 else None])
      example.features.feature['label'].int64_list.value.append(i % 2)
      writer.write(example.SerializeToString())
    writer.close()
    splits.append({'name': split, 'shardLengths': [str(count)], 'numBytes': '1',
                   'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'})
  with pytest.raises(UserError, match='no dataset_info.json in .*: give the prepared folder'):
    open_source('tfds', tmp_path)
  info = {'name': 'toy', 'version': '1.0.0', 'fileFormat': 'array_record', 'splits': splits}
  (tmp_path / 'dataset_info.json').write_text(json.dumps(info))
  train, val = (pickle.loads(pickle.dumps(open_source('tfds', tmp_path, split))) for split in sources.SPLITS)
  assert (len(train), len(val), train.class_names, train.num_classes) == (5, 2, ('cat', 'dog'), 2)
  np.testing.assert_array_equal(train[3][0], pixels[3])
  assert train[3][1] == 1
  with pytest.raises(UnreadableImage, match=r'image 4 of .*\(train\)'):
    train[4]
  assert 'tensorflow' not in sys.modules


# Batches

KW = dict(batch_size=6, size=(4, 4), seed=3)


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_every_image_comes_once_per_epoch(processes):
  source = numbered(15)  # epochs end within batches: 5 batches are 2 epochs
  shares = [take(train_batches(source, **KW, process_index=p, process_count=processes), 5) for p in range(processes)]
  order = np.concatenate([share[b]['label'] for b in range(5) for share in shares])
  for epoch in (order[:15], order[15:]):
    assert sorted(epoch.tolist()) == list(range(15))
  assert (order[:15] != order[15:]).any()
  other = np.concatenate([batch['label'] for batch in take(train_batches(source, **KW | {'seed': 4}), 5)])
  assert (order != other).any()


def test_processes_together_see_what_one_sees():
  source = open_source('digits')
  whole = take(train_batches(source, **KW, flip=True), 4)
  for n in (2, 3):
    parts = [take(train_batches(source, **KW, flip=True, process_index=p, process_count=n), 4) for p in range(n)]
    joined = [{name: np.concatenate([part[b][name] for part in parts]) for name in whole[0]} for b in range(4)]
    assert_same(joined, whole)


def test_batches_are_floats_and_int32():
  batch, = take(train_batches(open_source('digits'), **KW), 1)
  assert batch.keys() == {'image', 'label'}
  assert batch['image'].shape == (6, 4, 4, 3) and batch['image'].dtype == np.float32
  assert batch['label'].shape == (6,) and batch['label'].dtype == np.int32
  assert -1 <= batch['image'].min() < -0.5 < 0.5 < batch['image'].max() <= 1
  assert type(batch['image']) is np.ndarray


def test_start_skips_exactly_that_many_batches():
  source = open_source('digits')
  straight = take(train_batches(source, **KW, flip=True), 7)
  assert_same(take(train_batches(source, **KW, flip=True, start=4), 3), straight[4:])
  far = 10**7
  a, b = (take(train_batches(numbered(15), **KW, start=start), 2) for start in (far, far + 1))
  assert_same(a[1:], b[:1])


def test_crops_depend_on_seed_and_position_alone():
  source = numbered(1, size=4)
  source = ArraySource(noise(1, 12, 12, 3), source.labels, source.class_names)  # one image: only the crops differ
  first, again = (take(train_batches(source, batch_size=8, size=(6, 6), seed=0, enlarge=2), 2) for _ in range(2))
  assert_same(first, again)
  crops = {image.tobytes() for batch in first for image in batch['image']}
  assert len(crops) > 8
  other = take(train_batches(source, batch_size=8, size=(6, 6), seed=1, enlarge=2), 2)
  assert (other[0]['image'] != first[0]['image']).any()


def test_workers_change_nothing():
  source = open_source('digits')
  assert_same(take(train_batches(source, **KW, workers=2, start=3), 5), take(train_batches(source, **KW, start=3), 5))
  kw = dict(batch_size=4, size=(4, 4))
  source = Broken(7, [5])
  workers = eval_batches(source, **kw, workers=2)
  with pytest.raises(UserError, match='1 of 7 .*number 5, cannot read image 5.jpg: torn'):  # the reason crosses too
    list(workers)


@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_goes_once_through_the_source_and_masks_the_rest(processes):
  def run(limit):
    shares = [list(eval_batches(numbered(10), batch_size=4, size=(4, 4), limit=limit, process_index=p,
                                process_count=processes)) for p in range(processes)]
    label, mask, image = (np.concatenate([share[b][name] for b in range(len(shares[0])) for share in shares])
                          for name in ('label', 'mask', 'image'))
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(to_uint8(image)[:, 0, 0, 0], label)
    return label.tolist(), mask.tolist()
  label, mask = run(None)
  assert label[:10] == list(range(10)) and mask == [1] * 10 + [0] * 2
  label, mask = run(5)
  assert label[:5] == list(range(5)) and mask == [1] * 5 + [0] * 3 and set(label) == set(range(5))


def test_a_few_unreadable_images_are_replaced_and_counted():
  source = Broken(1000, range(500, 505))
  batches = train_batches(source, batch_size=100, size=(4, 4), seed=0)
  labels = np.concatenate([next(batches)['label'] for _ in range(10)])
  assert (batches.skipped, batches.drawn) == (5, 1000)
  assert np.bincount(labels, minlength=1000)[499:507].tolist() == [1, 0, 0, 0, 0, 0, 6, 1]
  batches.close()


def test_too_many_unreadable_images_are_an_error_with_name_and_reason():
  batches = train_batches(Broken(20, [7]), batch_size=20, size=(4, 4), seed=0)
  with pytest.raises(UserError, match=r'1 of 20 .* more than 1% of 20; .*number 7, cannot read image 7.jpg: torn'):
    next(batches)
  batches = eval_batches(Broken(1000, range(11)), batch_size=50, size=(4, 4))
  with pytest.raises(UserError, match='11 of 50'):
    next(batches)
  batches = eval_batches(Broken(300, range(300)), batch_size=2, size=(4, 4))
  with pytest.raises(UserError, match='100 images in a row .* image 0.jpg: torn'):
    next(batches)


def test_masked_rows_are_not_counted():
  batches = eval_batches(Broken(101, [0]), batch_size=100, size=(4, 4))
  assert len(list(batches)) == 2
  assert (batches.drawn, batches.skipped) == (101, 1)


def test_impossible_batches_are_refused():
  for change, match in ((dict(process_count=4), 'use a multiple'), (dict(batch_size=0), 'batch size 0'),
                        (dict(process_index=1), 'process_index 1')):
    with pytest.raises(UserError, match=match):
      train_batches(numbered(4), **KW | change)
  with pytest.raises(UserError, match='seed -1'):
    train_batches(numbered(4), **KW | {'seed': -1})
  with pytest.raises(UserError, match='empty'):
    eval_batches(numbered(0), batch_size=2, size=(4, 4))


def test_closing_twice_is_fine_and_ends_the_threads():
  before = threading.active_count()
  batches = train_batches(numbered(4), **KW)
  next(batches)
  batches.close()
  batches.close()
  for thread in threading.enumerate():
    if thread.name.startswith('grain-prefetch'):
      thread.join(5)
  assert threading.active_count() <= before
