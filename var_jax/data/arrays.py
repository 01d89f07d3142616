"""Images held in memory: NumPy archives, the IDX files of MNIST and its kin, scikit-learn's digits."""

import dataclasses
import gzip
import math
import os
import zlib

import numpy as np

from var_jax.errors import UserError, first_line

HELD_OUT = 0.05  # of the images, where a data set brings no validation part
DIGITS_TRAIN = 1500
MOST_CLASSES = 100_000
COMPACT = 'np.unique(labels, return_inverse=True)[1]'  # numbers labels from 0 on


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """Images in memory: images (N, H, W, 1 or 3) uint8, labels (N,). Workers get a copy each: prefer threads."""
  images: np.ndarray
  labels: np.ndarray
  class_names: tuple
  total: int = 0  # 0: as many as there are here
  notes: tuple = ()

  def __post_init__(self):
    object.__setattr__(self, 'total', self.total or len(self.images))

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    image = self.images[index]
    return np.broadcast_to(image, image.shape[:2] + (3,)), int(self.labels[index])

  def sizes(self):
    return [self.images.shape[1:3]]

  def contents(self):
    yield repr(self.images.shape).encode()
    yield self.labels.astype('<i4').tobytes()
    for image in self.images:
      yield image.tobytes()


def open_digits(split):
  """scikit-learn's 1,797 handwritten digits, 8x8 grey: 1,500 for training, 297 held out."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise UserError('the digits come with scikit-learn: pip install scikit-learn') from error
  digits = load_digits()
  images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
  return _array_source(images, digits.target, digits.target, _part(_permutation(len(images)), DIGITS_TRAIN, split),
                       len(images))


def open_arrays(path, split):
  """An .npz (images, labels / x_train, y_train, x_test, y_test / arr_0, labels) or a folder of IDX files.

  An .npz may also hold class_names, a text for each label.
  """
  if os.path.isdir(path):
    return _from_idx(path, split)
  try:
    with np.load(path) as file:
      return _from_npz(file, path, split)
  except UserError:
    raise
  except MemoryError:
    raise UserError(f'{path} does not fit into memory: make an image folder of it') from None
  except Exception as error:  # np.load fails in every way there is on broken files
    raise UserError(f'cannot read {path} as .npz of plain arrays: {first_line(error)}; '
                    'write it with np.savez') from error


def _from_npz(file, path, split):
  """ArraySource of one split of an open .npz."""
  if 'x_train' in file and 'y_train' in file:
    names = ('x_train', 'y_train')
  else:
    names = ('images' if 'images' in file else 'arr_0', 'labels')
  if not all(name in file for name in names):
    raise UserError(f'{path} holds {", ".join(file) or "nothing"}: name its arrays images and labels, '
                    'or x_train, y_train, x_test, y_test')
  class_names = _read(file, 'class_names', path) if 'class_names' in file else None
  labels = _labels(_read(file, names[1], path), path)
  if 'x_test' in file and 'y_test' in file and names[0] == 'x_train':
    test_labels = _labels(_read(file, 'y_test', path), path)
    name, own = (names[0], labels) if split == 'train' else ('x_test', test_labels)
    images = _checked(_read(file, name, path), own, path)
    return _array_source(images, own, labels, None, len(labels) + len(test_labels), test_labels, class_names)
  images = _checked(_read(file, names[0], path), labels, path)
  held = max(1, round(HELD_OUT * len(images)))
  rows = _part(_permutation(len(images)), len(images) - held, split)
  if not len(rows):
    raise UserError(f'{path} has a single image, none can be held out: add more')
  return _array_source(images, labels, labels, rows, len(images), class_names=class_names)


def _read(file, name, path):
  """An array of an open .npz. UserError where the file is too short for it, before memory is taken for it."""
  with file.zip.open(f'{name}.npy') as member:
    shape, _, dtype = npy_header(member)
  if math.prod(shape) * dtype.itemsize > file.zip.getinfo(f'{name}.npy').file_size:
    raise UserError(f'{path} is truncated: {name} should have the shape {shape}; write it again')
  return np.asarray(file[name])


def npy_header(file):
  """(shape, whether in Fortran order, dtype) of an open .npy, of which the file then is at the first element."""
  version = np.lib.format.read_magic(file)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  return read(file)


def _checked(images, labels, path):
  """images as (N, H, W, 1 or 3), after checking that they are images, one for each label."""
  if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
    raise UserError(f'images in {path} are {images.dtype} {images.shape}: store uint8 (N,H,W), (N,H,W,1) or (N,H,W,3)')
  if len(labels) != len(images) or not len(images):
    raise UserError(f'{path} has {len(images)} images, labels for {len(labels)}: give each an int >= 0')
  if not images.size:
    raise UserError(f'images in {path} have the shape {images.shape}, without a pixel: store others')
  return images if images.ndim == 4 else images[..., None]


def _labels(labels, path):
  """Labels as (N,) int32. UserError for what cannot be the number of a class."""
  if labels.dtype.kind in 'US':
    raise UserError(f'labels in {path} are texts: store numbers, class_names, labels = np.unique(labels, '
                    'return_inverse=True), and the names as class_names')
  if labels.ndim == 2 and 1 not in labels.shape and labels.dtype.kind in 'biuf' and (labels.sum(axis=1) == 1).all():
    raise UserError(f'labels in {path} are {labels.shape}, one column a class: store np.argmax(labels, axis=1)')
  if labels.ndim not in (1, 2) or labels.ndim == 2 and 1 not in labels.shape:
    raise UserError(f'labels in {path} have the shape {labels.shape}: store (N,), and give each an int >= 0')
  labels = labels.reshape(-1)
  if labels.dtype.kind not in 'biuf' or not (labels == np.rint(labels)).all():
    raise UserError(f'labels in {path} are {labels.dtype} and no whole numbers: give each an int >= 0')
  for bad, way in ((labels < 0, 'give the image a class, or leave it out'),
                   (labels >= MOST_CLASSES, f'classes count from 0; {COMPACT} numbers them so')):
    if bad.any():
      first = int(np.argmax(bad))
      raise UserError(f'label {labels[first].item()} of image {first} in {path} cannot be used: {way}')
  return labels.astype(np.int32)


def _array_source(images, labels, train_labels, rows, total, test_labels=(), class_names=None):
  """ArraySource of the given rows, None for all; classes are 0 to the largest label of both parts."""
  classes = int(max(train_labels.max(), np.max(test_labels, initial=0))) + 1
  if class_names is not None and (class_names.dtype.kind != 'U' or class_names.ndim != 1 or len(class_names) < classes):
    raise UserError(f'class_names are {class_names.dtype} {class_names.shape}: store ({classes},) texts')
  names = tuple(map(str, range(classes) if class_names is None else class_names.tolist()))
  empty = np.flatnonzero(np.bincount(train_labels, minlength=len(names)) == 0)
  notes = ()
  if len(empty):
    notes = (f'no training images of {len(empty):,} of {len(names):,} classes, such as label {empty[0]}: if they are '
             f'no classes, number the labels from 0 on, by {COMPACT}',)
  if rows is not None:
    images, labels = images[rows], labels[rows]
  return ArraySource(images, labels, names, total, notes)


def _permutation(n):
  """A fixed order of n rows. RandomState: its streams are frozen, those of default_rng may change with NumPy."""
  return np.random.RandomState(0).permutation(n)


def _part(order, train, split):
  """Sorted rows of a split: the first `train` of the order, or the others."""
  return np.sort(order[:train] if split == 'train' else order[train:])


def _from_idx(folder, split):
  """ArraySource of the four files of MNIST and its kin: train-images-idx3-ubyte[.gz], t10k-labels-... and so on."""
  part = 'train' if split == 'train' else 't10k'
  labels = {name: _labels(_idx(folder, f'{name}-labels-idx1-ubyte', 1), folder) for name in ('train', 't10k')}
  images = _checked(_idx(folder, f'{part}-images-idx3-ubyte', 3), labels[part], folder)
  return _array_source(images, labels[part], labels['train'], None, sum(map(len, labels.values())), labels['t10k'])


def _idx(folder, name, dimensions):
  """uint8 array of the IDX file folder/name or folder/name.gz."""
  files = [file for file in (os.path.join(folder, name + suffix) for suffix in ('', '.gz')) if os.path.exists(file)]
  if not files:
    raise UserError(f'no {name} or {name}.gz in {folder}: put the IDX files there, or give an .npz')
  try:
    with (gzip.open if files[0].endswith('.gz') else open)(files[0], 'rb') as file:
      data = file.read()
    if data[:4] != bytes([0, 0, 8, dimensions]):
      raise ValueError(f'not an IDX file of bytes in {dimensions} dimensions')
    shape = [int(size) for size in np.frombuffer(data, '>u4', dimensions, 4)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
  except (ValueError, OSError, EOFError, zlib.error) as error:
    raise UserError(f'cannot read {files[0]}: {first_line(error)}; download it again') from error
