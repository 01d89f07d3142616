"""Images held in memory: NumPy archives, the IDX files of MNIST and its kin, scikit-learn's digits."""

import dataclasses
import gzip
import os
import zipfile
import zlib

import numpy as np

from var_jax.errors import UserError, first_line

HELD_OUT = 0.05  # of the images, where a data set brings no validation part
DIGITS_TRAIN = 1500


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
  return _array_source(images, digits.target, digits.target, _part(_permutation(len(images)), DIGITS_TRAIN, split))


def open_arrays(path, split):
  """An .npz (images, labels / x_train, y_train, x_test, y_test / arr_0, labels) or a folder of IDX files."""
  if os.path.isdir(path):
    return _from_idx(path, split)
  try:
    with np.load(path) as file:
      return _from_npz(file, path, split)
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
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
  train_labels = np.asarray(file[names[1]])
  if 'x_test' in file and 'y_test' in file and names[0] == 'x_train':
    test_labels = np.asarray(file['y_test'])
    images, labels = (file['x_train'], train_labels) if split == 'train' else (file['x_test'], test_labels)
    return _array_source(_checked(images, labels, path), labels, np.append(train_labels, test_labels))
  images = _checked(file[names[0]], train_labels, path)
  held = max(1, round(HELD_OUT * len(images)))
  rows = _part(_permutation(len(images)), len(images) - held, split)
  if not len(rows):
    raise UserError(f'{path} has a single image, none can be held out: add more')
  return _array_source(images, train_labels, train_labels, rows)


def _checked(images, labels, path):
  """images as (N, H, W, 1 or 3), after checking them and their labels."""
  if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
    raise UserError(f'images in {path} are {images.dtype} {images.shape}: store uint8 (N,H,W), (N,H,W,1) or (N,H,W,3)')
  if labels.dtype.kind not in 'iu' or labels.size != len(images) or not len(images) or labels.min() < 0:
    raise UserError(f'{path} has {len(images)} images, labels {labels.dtype} {labels.shape}: give each an int >= 0')
  return images if images.ndim == 4 else images[..., None]


def _array_source(images, labels, all_labels, rows=None):
  """ArraySource of the given rows; classes are 0 to the largest of all_labels."""
  labels = labels.reshape(-1).astype(np.int32)
  if rows is not None:
    images, labels = images[rows], labels[rows]
  return ArraySource(images, labels, tuple(str(name) for name in range(int(all_labels.max()) + 1)), all_labels.size)


def _permutation(n):
  """A fixed order of n rows. RandomState: its streams are frozen, those of default_rng may change with NumPy."""
  return np.random.RandomState(0).permutation(n)


def _part(order, train, split):
  """Sorted rows of a split: the first `train` of the order, or the others."""
  return np.sort(order[:train] if split == 'train' else order[train:])


def _from_idx(folder, split):
  """ArraySource of the four files of MNIST and its kin: train-images-idx3-ubyte[.gz], t10k-labels-... and so on."""
  part = 'train' if split == 'train' else 't10k'
  labels = {name: _idx(folder, f'{name}-labels-idx1-ubyte', 1) for name in ('train', 't10k')}
  images = _checked(_idx(folder, f'{part}-images-idx3-ubyte', 3), labels[part], folder)
  return _array_source(images, labels[part], np.append(labels['train'], labels['t10k']))


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
    shape = np.frombuffer(data, '>u4', dimensions, 4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
  except (ValueError, OSError, EOFError, zlib.error) as error:
    raise UserError(f'cannot read {files[0]}: {first_line(error)}; download it again') from error
