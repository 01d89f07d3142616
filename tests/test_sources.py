"""Random-access sources: what they hold, how they split, what they refuse."""

import gzip
import json
import pickle
import struct
import sys

import numpy as np
import pytest
from tiny_images import encoded, noise

from var_jax.data import sources
from var_jax.data.arrays import ArraySource
from var_jax.data.images import UnreadableImage
from var_jax.data.sources import identity, open_source
from var_jax.errors import UserError


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
  assert train.class_names == ('ant', 'bee', 'cat', 'elk')
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


def test_identity_is_that_of_the_images_and_changes_with_any_of_them(tmp_path):
  """Whatever is kept from images, such as their tokens, is bound to all of them and not to where they lie."""
  for place in ('a', 'b'):
    make_folder(tmp_path / place, ['x', 'y'], 30)
  of = lambda place: [identity(open_source('folder', tmp_path / place, split)) for split in sources.SPLITS]
  assert of('a') == of('b') and of('a')[0] != of('a')[1]
  file, seen = tmp_path / 'a' / 'x' / '8.png', [of('a')]
  whole = file.read_bytes()
  changes = {'as_long': lambda: file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]),
             'added': lambda: (tmp_path / 'a' / 'x' / 'new.png').write_bytes(whole),
             'renamed': lambda: file.rename(file.with_name('800.png')),
             'removed': file.with_name('800.png').unlink,
             'class': lambda: (tmp_path / 'a' / 'x').rename(tmp_path / 'a' / 'other')}
  for name, change in changes.items():
    change()
    assert of('a') not in seen, name
    seen.append(of('a'))
  assert of('b') == seen[0]
  long = noise(200, 200, 3)
  for place in ('a', 'b'):
    (tmp_path / place / 'y' / 'long.png').write_bytes(encoded(long))
    long[100, 100] ^= 1
  assert of('a')[0] != of('b')[0]


def test_identity_of_arrays_is_of_every_pixel_and_label():
  pixels, labels = noise(50, 4, 4, 3), np.arange(50) % 3
  make = lambda pixels=pixels, labels=labels, names=('a', 'b', 'c'): identity(ArraySource(pixels, labels, names))
  other, swapped = pixels.copy(), labels.copy()
  other[20, 1, 1, 1] ^= 1
  swapped[[1, 2]] = swapped[[2, 1]]
  found = [make(), make(other), make(labels=swapped), make(names=('a', 'b', 'd')), make(pixels.reshape(50, 2, 8, 3))]
  assert len(set(found)) == 5 and make() == found[0]


def test_total_counts_both_parts(tmp_path):
  make_folder(tmp_path / 'whole', ['x', 'y'], 40)
  make_folder(tmp_path / 'parts' / 'train', ['x', 'y'], 5)
  make_folder(tmp_path / 'parts' / 'val', ['x', 'y'], 2)
  np.savez(tmp_path / 'a.npz', images=noise(40, 4, 4, 3), labels=np.arange(40) % 2)
  np.savez(tmp_path / 'b.npz', x_train=noise(40, 4, 4, 3), y_train=np.arange(40) % 2,
           x_test=noise(7, 4, 4, 3), y_test=np.arange(7) % 2)
  for kind, path, total in (('folder', 'whole', 80), ('folder', 'parts', 14), ('arrays', 'a.npz', 40),
                            ('arrays', 'b.npz', 47), ('digits', None, 1797)):
    found = {open_source(kind, path and tmp_path / path, split).total for split in sources.SPLITS}
    assert found == {total}, path


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
  assert (len(train), len(val), len(train.class_names)) == (1500, 297, 10)
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
  assert (len(train), len(val), len(train.class_names), len(val.class_names)) == (5, 2, 4, 4)
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
    assert (len(train), len(val), len(train.class_names), len(val.class_names)) == (38, 2, 7, 7)
    found = {image.tobytes(): label for part in (train, val) for image, label in (part[i] for i in range(len(part)))}
    assert found == {image.tobytes(): label for image, label in zip(pixels, labels)}
  np.savez(path, x_train=pixels[..., 0], y_train=labels, x_test=pixels[:3, ..., :1], y_test=labels[:3])
  train, val = (open_source('arrays', path, split) for split in sources.SPLITS)
  assert (len(train), len(val), len(val.class_names)) == (40, 3, 7)
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
  assert (len(train), len(val), train.class_names) == (5, 2, ('cat', 'dog'))
  np.testing.assert_array_equal(train[3][0], pixels[3])
  assert train[3][1] == 1
  with pytest.raises(UnreadableImage, match=r'image 4 of .*\(train\)'):
    train[4]
  assert 'tensorflow' not in sys.modules
