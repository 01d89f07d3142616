"""Random-access sources of labelled images: `len(source)`, `source[i] -> (uint8 (H, W, 3), int label)`.

Each has `class_names`, a tuple of str, and `num_classes`; each can be pickled for grain's worker processes. Which
images are held out for validation never depends on listing order, seed or process.
"""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import zipfile
import zlib

import numpy as np

from var_jax.data.images import read_image
from var_jax.data.tokens import TokenSource
from var_jax.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
SPLITS = ('train', 'validation')
HELD_OUT = 0.05  # of the images, where a data set brings no validation part
DIGITS_TRAIN = 1500


def image_files(folder):
  """The image files in a folder and in folders within, in the order of their paths; hidden ones are left out."""
  return sorted(p for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES and not p.name.startswith('.'))


def moved(config, place):
  """A config with its data elsewhere: 'PATH', or 'KIND:PATH' for another kind of data, such as folder:/data/photos."""
  kind, _, path = place.rpartition(':')
  config = config.copy_and_resolve_references().unlock()
  config.data.update(path=path, **({'source': kind} if kind else {}))
  return config.lock()


def open_source(kind, path=None, split='train', tokens=False):
  """Source of a kind: 'digits' (no path), 'folder', 'arrays' (.npz or folder of IDX files) or 'tfds' (prepared data).

  split: 'train' or 'validation'. tokens: whether 'tokens' will do in place of images. Raises UserError when kind or
  split is unknown, or path does not hold such data.
  """
  kinds = {'digits': _open_digits, 'folder': _open_folder, 'arrays': _open_arrays, 'tfds': TfdsSource,
           'tokens': TokenSource}
  if kind not in kinds:
    raise UserError(f'unknown kind of data {kind!r}: use one of {", ".join(kinds)}')
  if kind == 'tokens' and not tokens:
    raise UserError(f'{path} holds tokens, but this needs images: say where those are, by --data=KIND:PATH to evaluate '
                    'or reconstruct, by --config.data.source=KIND --config.data.path=PATH to train')
  if split not in SPLITS:
    raise UserError(f'unknown split {split!r}: use train or validation')
  if kind == 'digits':
    if path:
      raise UserError(f'the digits need no path, but {str(path)!r} was given: leave it out, or choose another source')
    return kinds[kind](split)
  if not path or not os.path.exists(path):
    hint = 'give it with --config.data.path=PATH to train, with --data=PATH to evaluate or reconstruct'
    if path and 'fashion-mnist' in str(path):
      hint = 'on Debian or Ubuntu, run `apt-get install dataset-fashion-mnist`'
    raise UserError(f'no data at {str(path or "")!r} for the source {kind!r}: {hint}')
  return kinds[kind](str(path), split)


class _Source:
  """What all sources share."""

  @property
  def num_classes(self):
    return len(self.class_names)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(_Source):
  """Images in memory: images (N, H, W, 1 or 3) uint8, labels (N,). Workers get a copy each: prefer threads."""
  images: np.ndarray
  labels: np.ndarray
  class_names: tuple

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    image = self.images[index]
    return np.broadcast_to(image, image.shape[:2] + (3,)), int(self.labels[index])


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(_Source):
  """Image files root/name, decoded when asked for; `source[i]` raises UnreadableImage for a broken one."""
  root: str
  names: tuple
  labels: np.ndarray
  class_names: tuple

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    return read_image(os.path.join(self.root, self.names[index])), int(self.labels[index])


class TfdsSource(_Source):
  """A data set prepared by tensorflow_datasets as ArrayRecord files; path/dataset_info.json describes it.

  Bytes are decoded by `read_image`, so TensorFlow is not needed. A data set without 'validation' uses 'test'.
  """

  def __init__(self, path, split):
    try:
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise UserError("reading tfds data needs a package: pip install 'var_jax[tfds]'") from error
    self._origin = path, split
    if not os.path.exists(os.path.join(path, 'dataset_info.json')):
      raise UserError(f'no dataset_info.json in {path}: give the prepared folder, such as .../imagenet2012/5.1.0')
    try:
      builder = tfds.builder_from_directory(path)
      if split == 'validation' and split not in builder.info.splits:
        split = 'test'
      features = builder.info.features
      self.class_names = tuple(features['label'].names)
      decoders = {'image': tfds.decode.SkipDecoding()}
      self._records = builder.as_data_source(split, decoders=decoders)
    except Exception as error:  # tfds raises its own kinds for missing splits, features, shards and file formats
      raise UserError(f'cannot read split {split!r} of {path}: {_line(error)}; it needs features image and label, '
                      'prepared with file_format array_record') from error
    self._name = f'{path} ({split})'

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    return read_image(record['image'], name=f'{index} of {self._name}'), int(record['label'])

  def __reduce__(self):
    return TfdsSource, self._origin


def _open_digits(split):
  """scikit-learn's 1,797 handwritten digits, 8x8 grey: 1,500 for training, 297 held out."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise UserError('the digits come with scikit-learn: pip install scikit-learn') from error
  digits = load_digits()
  images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
  return _array_source(images, digits.target, digits.target, _part(_permutation(len(images)), DIGITS_TRAIN, split))


def _open_folder(path, split):
  """path/train/CLASS/**/*.jpg, or path/CLASS/**/*.jpg; validation from path/val or path/validation, or held out."""
  root = pathlib.Path(path)
  if not root.is_dir():
    raise UserError(f'{root} is a file: give a folder with train/CLASS/*.jpg or CLASS/*.jpg')
  val_roots = [root / name for name in ('val', 'validation') if (root / name).is_dir()]
  if val_roots and not (root / 'train').is_dir():
    raise UserError(f'{val_roots[0]} has no train/ beside it: move the training images to {root / "train"}')
  train_root = root / 'train' if (root / 'train').is_dir() else root
  classes = _folders(train_root)
  if not classes:
    raise UserError(f'no class folders in {train_root}: sort the images into {train_root}/CLASS/*.jpg')
  if val_roots and split == 'validation':
    return _class_folders(val_roots[0], classes, train_root)
  source = _class_folders(train_root, classes)
  return source if val_roots else _hold_out(source, split)


def _class_folders(root, classes, train_root=None):
  """FolderSource of the images in root/CLASS; the classes must be those of train_root."""
  if train_root and (odd := sorted(set(classes) ^ set(_folders(root)))):
    raise UserError(f'{root} and {train_root} differ in classes ({", ".join(odd[:5])}): give both the same folders')
  names, labels = [], []
  for label, name in enumerate(classes):
    images = sorted(_images(root, name))
    if not images:
      raise UserError(f'no images ({", ".join(SUFFIXES)}) in {root / name}: add some or remove the folder')
    names += images
    labels += [label] * len(images)
  return FolderSource(str(root), tuple(names), np.array(labels, np.int32), tuple(classes))


def _folders(root):
  """Sorted names of the visible folders in root."""
  with os.scandir(root) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))


def _images(root, name):
  """Paths of the images below root/name, relative to root, with forward slashes; not the hidden ones macOS leaves."""
  for folder, subfolders, files in os.walk(root / name):
    subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith('.')]
    for file in files:
      if file.lower().endswith(SUFFIXES) and not file.startswith('.'):
        yield pathlib.Path(folder, file).relative_to(root).as_posix()


def _hold_out(source, split):
  """One side of a split by the hash of names: 5 % of each class, at least one image, but never a class's only one."""
  keep = np.zeros(len(source), bool)
  for label in range(source.num_classes):
    members = np.flatnonzero(source.labels == label)
    ranked = sorted(members, key=lambda i: hashlib.blake2b(os.fsencode(source.names[i]), digest_size=8).digest())
    held = min(max(1, round(HELD_OUT * len(members))), len(members) - 1)
    keep[ranked[:held]] = True
  keep = keep if split == 'validation' else ~keep
  if not keep.any():
    raise UserError(f'every class in {source.root} has one image, none can be held out: add more, or a val/ folder')
  names = tuple(name for name, kept in zip(source.names, keep) if kept)
  return FolderSource(source.root, names, source.labels[keep], source.class_names)


def _open_arrays(path, split):
  """An .npz (images, labels / x_train, y_train, x_test, y_test / arr_0, labels) or a folder of IDX files."""
  if os.path.isdir(path):
    return _from_idx(path, split)
  try:
    with np.load(path) as file:
      return _from_npz(file, path, split)
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
    raise UserError(f'cannot read {path} as .npz of plain arrays: {_line(error)}; write it with np.savez') from error


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
  return ArraySource(images, labels, tuple(str(name) for name in range(int(all_labels.max()) + 1)))


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
    raise UserError(f'cannot read {files[0]}: {_line(error)}; download it again') from error


def _line(error):
  """First line of an error's message."""
  return (str(error) or type(error).__name__).splitlines()[0]
