"""Random-access sources: what they hold, how they split, what they refuse."""

import contextlib
import gzip
import json
import os
import pathlib
import pickle
import struct
import sys
import tempfile

import numpy as np
import pytest
from tiny_images import encoded, noise

from var_jax.data import files, sources
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


@contextlib.contextmanager
def as_nobody():
  """As a user without rights: root reads everything."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.mark.parametrize('train, held_out', [
    ('Training', 'Testing'), ('Train', 'Val'), ('TRAIN', 'valid'), ('train', 'validation'), ('train', 'test'),
    ('training_set', 'test_set'), ('seg_train/seg_train', 'seg_test/seg_test'), ('train2017', 'val2017')])
def test_parts_of_a_set_are_told_by_their_names_however_written(tmp_path, train, held_out):
  make_folder(tmp_path / train, ['x', 'y'], 4)
  make_folder(tmp_path / held_out, ['x', 'y'], 2, start=50)
  sets = [open_source('folder', tmp_path, split) for split in sources.SPLITS]
  assert [len(part) for part in sets] == [8, 4] and sets[0].class_names == sets[1].class_names == ('x', 'y')
  assert f'held out: {tmp_path / held_out}'.partition('/seg_test/')[0] in sources.summary(*sets)


def test_test_images_are_not_trained_on_where_val_is_held_out(tmp_path):
  for part, start in (('train', 0), ('val', 50), ('test', 90)):
    make_folder(tmp_path / part, ['x', 'y'], 3, start=start)
  make_folder(tmp_path, ['extra'], 1)
  (tmp_path / 'loose.png').write_bytes(encoded(noise(4, 4, 3)))
  train, val = (open_source('folder', tmp_path, split) for split in sources.SPLITS)
  values = [sorted(int(part[i][0].max()) for i in range(len(part))) for part in (train, val)]
  assert values == [[0, 0, 1, 1, 2, 2], [50, 50, 51, 51, 52, 52]]
  said = sources.summary(train, val)
  assert f'not read: {tmp_path}/test, {tmp_path}/extra, images in {tmp_path} itself (1)' in said


def test_flat_test_images_are_left_alone_and_a_class_may_be_called_train(tmp_path):
  make_folder(tmp_path / 'a' / 'train', ['x', 'y'], 40)
  (tmp_path / 'a' / 'test').mkdir()
  (tmp_path / 'a' / 'test' / '0.png').write_bytes(encoded(noise(4, 4, 3)))
  train, val = (open_source('folder', tmp_path / 'a', split) for split in sources.SPLITS)
  assert (len(train), len(val)) == (76, 4) and f'not read: {tmp_path}/a/test' in sources.summary(train, val)
  make_folder(tmp_path / 'b', ['bus', 'car', 'train'], 4)
  for name in ('bus', 'car', 'train'):  # images alone
    for file in (tmp_path / 'b' / name / 'nested').iterdir():
      file.rename(tmp_path / 'b' / name / file.name)
    (tmp_path / 'b' / name / 'nested').rmdir()
  assert open_source('folder', tmp_path / 'b').class_names == ('bus', 'car', 'train')


@pytest.mark.parametrize('folders, words', [
    (['train/x', 'Train/x'], 'train/ and Train/|Train/ and train/'),
    (['train/x', 'val/x', 'valid/x'], 'val/ and valid/, which may both be'),
    (['x', 'y', 'test'], 'test has no train/ beside it: move the training images to .*where test is a class'),
    (['x', 'y', 'test/x', 'test/y'], 'test has no train/ beside it'),
    (['train/x', 'val'], 'val has no class folders: sort its images into .*valprep.sh.*5 % of each class'),
    (['data/train/x', 'data/val/x'], r'holds train/ and val/, .*: give .*data as the path'),
    (['x/train', 'x/test', 'y/train', 'y/test'], 'holds test/ and train/, .*: move them to .*/train/x'),
    (['train', 'val'], 'val has no train/|no class folders in .*train'),
])
def test_folders_that_can_be_meant_in_two_ways_are_refused_with_the_way_out(tmp_path, folders, words):
  for folder in folders:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / '1.png').write_bytes(encoded(noise(4, 4, 3)))
  with pytest.raises(UserError, match=words) as caught:
    open_source('folder', tmp_path)
  assert '\n' not in str(caught.value)


def test_links_are_followed_once_and_never_in_circles(tmp_path):
  """Sets are often linked together from several disks; `image_files` is what --images, --samples, --reference read."""
  make_folder(tmp_path / 'disk', ['cats', 'dogs'], 4)
  make_folder(tmp_path / 'set', ['cat'], 2, start=20)
  (tmp_path / 'set' / 'cat' / 'more').symlink_to(tmp_path / 'disk' / 'cats')
  (tmp_path / 'set' / 'cat' / 'again').symlink_to(tmp_path / 'disk' / 'cats')
  (tmp_path / 'set' / 'cat' / 'up').symlink_to('..')
  (tmp_path / 'set' / 'cat' / 'itself').symlink_to('nested')
  (tmp_path / 'set' / 'dog').symlink_to(tmp_path / 'disk' / 'dogs')
  (tmp_path / 'disk' / 'dogs' / 'all').symlink_to(tmp_path)
  (tmp_path / 'set' / 'cat' / 'one.png').symlink_to(tmp_path / 'disk' / 'dogs' / '0.png')
  train, val = (open_source('folder', tmp_path / 'set', split) for split in sources.SPLITS)
  names = sorted([*train.names, *val.names])
  assert names == sorted([
      'cat/20.png', 'cat/nested/21.png', 'cat/one.png', *(f'cat/again/{name}' for name in (
          '0.png', '2.png', 'nested/1.png', 'nested/3.png')), 'dog/0.png', 'dog/2.png', 'dog/nested/1.png',
      'dog/nested/3.png'])
  assert [path.relative_to(tmp_path / 'set').as_posix() for path in files.image_files(tmp_path / 'set')] == names
  assert 'links to folders that are read already (2)' in sources.summary(train, val)


def test_folders_that_cannot_be_read_are_named(monkeypatch):
  with tempfile.TemporaryDirectory() as root:  # which others may enter
    make_folder(pathlib.Path(root), ['cat', 'dog'], 3)
    os.chmod(root, 0o755)
    os.chmod(f'{root}/dog/nested', 0)
    for read in (lambda: open_source('folder', root), lambda: files.image_files(root)):
      with as_nobody(), pytest.raises(UserError, match='dog/nested .Permission denied.: make it readable'):
        read()
    os.chmod(f'{root}/dog/nested', 0o755)
    os.symlink('/nowhere/cats', f'{root}/cat/more')
    with pytest.raises(UserError, match='cat/more is a link to /nowhere/cats, which cannot be reached'):
      open_source('folder', root)


def test_what_is_no_image_of_the_users_is_left_out_everywhere_and_counted(tmp_path):
  make_folder(tmp_path, ['cat'], 4)
  cat = tmp_path / 'cat'
  for folder in ('@eaDir/0.png', '.ipynb_checkpoints', '__MACOSX', 'photo.jpg'):
    (cat / folder).mkdir(parents=True)
    (cat / folder / 'thumb.jpg').write_bytes(encoded(noise(4, 4, 3), 'JPEG'))
  (tmp_path / '@eaDir').mkdir()
  for name in ('._0.png', '.DS_Store', 'a.heic', 'b.HEIC', 'notes.txt', 'nothing'):
    (cat / name).write_bytes(b'?')
  os.mkfifo(cat / 'pipe.png')
  for suffix, form in (('.bmp', 'BMP'), ('.JFIF', 'JPEG'), ('.tif', 'TIFF'), ('.tiff', 'TIFF'), ('.gif', 'GIF')):
    (cat / f'new{suffix}').write_bytes(encoded(noise(4, 4, 3), form))
  train, val = (open_source('folder', tmp_path, split) for split in sources.SPLITS)
  wanted = ['0.png', '2.png', 'nested/1.png', 'nested/3.png', 'new.JFIF', 'new.bmp', 'new.gif', 'new.tif', 'new.tiff']
  assert sorted([*train.names, *val.names]) == [f'cat/{name}' for name in wanted] and train.class_names == ('cat',)
  assert [path.relative_to(cat).as_posix() for path in files.image_files(tmp_path)] == wanted
  assert all(train[i][0].shape[2] == 3 for i in range(len(train)))
  said = sources.summary(train, val)
  for word in ('.heic (2)', '.txt (1)', '@eaDir/ (2)', '.ipynb_checkpoints/ (1)', '__MACOSX/ (1)', 'hidden images (1)',
               'folders named like images (1)', 'files without suffix (1)', 'pipes or devices (1)'):
    assert word in said, said


def test_listing_order_does_not_matter(tmp_path, monkeypatch):
  make_folder(tmp_path, ['a', 'b'], 30)
  (tmp_path / 'a' / 'z').symlink_to('../b/nested')
  (tmp_path / 'a' / 'y').symlink_to('../b/nested')
  found = open_source('folder', tmp_path, 'validation').names
  scan = os.scandir

  @contextlib.contextmanager
  def backwards(folder):
    with scan(folder) as entries:
      yield sorted(entries, key=lambda entry: entry.name, reverse=True)

  monkeypatch.setattr(os, 'scandir', backwards)
  assert open_source('folder', tmp_path, 'validation').names == found


def test_names_with_commas_can_be_given(tmp_path):
  for name in ('a,b.jpg', 'c.jpg', 'x,y/1.png', 'x,y/2.png'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(encoded(noise(4, 4, 3)))
  named = lambda *texts: [str(path.relative_to(tmp_path)) for path in files.images_named(texts)]
  assert named(f'{tmp_path}/a,b.jpg,{tmp_path}/c.jpg', f'{tmp_path}/x,y') == ['a,b.jpg', 'c.jpg', 'x,y/1.png', 'x,y/2.png']
  assert named(f'{tmp_path}/gone.jpg,{tmp_path}/c.jpg') == ['gone.jpg', 'c.jpg']
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='no images .* in .*empty'):
    named(f'{tmp_path}/empty')


def test_summary_says_what_was_read(tmp_path):
  make_folder(tmp_path, [str(i) for i in (1, 2, 10, 11)], 40)
  said = sources.summary(*(open_source('folder', tmp_path, split) for split in sources.SPLITS)).splitlines()
  assert said == ['data: 152 images to train on, 8 held out, of 6x6 pixels',
                  '4 classes: 1 (38), 10 (38), 11 (38), 2 (38)',
                  "the classes' names are numbers, but not their labels: 1 has the label 0",
                  'held out: 5 % of each class, the same ones always']
  digits = [open_source('digits', split=split) for split in sources.SPLITS]
  assert sources.summary(*digits).startswith('data: 1,500 images to train on, 297 held out, of 8x8 pixels\n10 classes: 0 (')


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


@pytest.mark.parametrize('values, words', [
    ([0, 1, 2_000_000_000, 3], 'label 2000000000 of image 2 .*return_inverse'),
    (np.array([0, 1, 2**63 + 5, 3], np.uint64), f'label {2**63 + 5} of image 2'),
    ([0, -1, 1, 2], 'label -1 of image 1 .*leave it out'),
    ([0.0, np.nan, 1.0, 2.0], 'no whole numbers'), ([0.0, np.inf, 1.0, 2.0], 'label|whole'),
    (np.eye(4), 'np.argmax'), (np.zeros((2, 2), int), r'shape \(2, 2\)'),
    (['cat', 'dog', 'cat', 'dog'], 'texts: .*class_names'), (np.zeros(4, complex), 'no whole numbers'),
    ([], '4 images, labels for 0'), (3, r'shape \(\)')])
def test_labels_that_are_no_classes_are_refused_by_their_value(tmp_path, values, words):
  """By the value, and at once: a table of two thousand million class names would fill the memory first."""
  np.savez(tmp_path / 'a.npz', images=noise(4, 2, 2, 3), labels=values)
  np.savez(tmp_path / 'b.npz', x_train=noise(4, 2, 2), y_train=np.arange(4), x_test=noise(4, 2, 2), y_test=values)
  for name in ('a.npz', 'b.npz')[:1 + (np.size(values) > 0)]:
    with pytest.raises(UserError, match=words) as caught:
      open_source('arrays', tmp_path / name)
    assert '\n' not in str(caught.value)


def test_labels_of_any_whole_kind_are_labels_and_gaps_are_said(tmp_path):
  for values in (np.array([1, 2, 3, 4] * 10), np.array([1., 2., 3., 4.] * 10), np.array([[1], [2], [3], [4]] * 10),
                 np.array([[1, 2, 3, 4] * 10], np.uint8)):
    np.savez(tmp_path / 'a.npz', images=noise(40, 2, 2), labels=values)
    sets = [open_source('arrays', tmp_path / 'a.npz', split) for split in sources.SPLITS]
    assert len(sets[0].class_names) == 5 and sets[0].labels.dtype == np.int32
    assert 'no training images of 1 of 5 classes, such as label 0: ' in sources.summary(*sets)
  np.savez(tmp_path / 'a.npz', images=noise(40, 2, 2), labels=np.arange(40) % 2 == 0)
  assert open_source('arrays', tmp_path / 'a.npz').class_names == ('0', '1')


def test_an_npz_may_name_its_classes(tmp_path):
  write = lambda names: np.savez(tmp_path / 'a.npz', images=noise(40, 2, 2), labels=np.arange(40) % 2, class_names=names)
  write(['cat', 'dog'])
  assert open_source('arrays', tmp_path / 'a.npz').class_names == ('cat', 'dog')
  for names in (['cat'], [1, 2], 'cat'):
    write(names)
    with pytest.raises(UserError, match=r'store \(2,\) texts'):
      open_source('arrays', tmp_path / 'a.npz')


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
  assert train.total == val.total == 7 and len(identity(train)) == 12
  np.testing.assert_array_equal(train[3][0], pixels[3])
  assert train[3][1] == 1
  with pytest.raises(UnreadableImage, match=r'image 4 of .*\(train\)'):
    train[4]
  assert 'tensorflow' not in sys.modules
