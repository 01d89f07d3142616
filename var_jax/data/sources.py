"""Random-access sources of labelled images: `len(source)`, `source[i] -> (uint8 (H, W, 3), int label)`.

Each has `class_names`, a tuple of str; `total`, the images of training and held-out part together; `contents()`, bytes
that tell its images from others, for `identity`. Each can be pickled for grain's worker processes. Which images are
held out for validation never depends on listing order, seed or process.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from var_jax.data.arrays import HELD_OUT, open_arrays, open_digits
from var_jax.data.files import digests
from var_jax.data.images import read_image
from var_jax.data.tokens import TokenSource
from var_jax.errors import UserError, first_line

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
SPLITS = ('train', 'validation')


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
  kinds = {'digits': open_digits, 'folder': _open_folder, 'arrays': open_arrays, 'tfds': TfdsSource,
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


def identity(source):
  """12 hexadecimal digits that tell the images, labels and class names of a source from others.

  No image is decoded. The same images have the same digits on every machine and in every folder. Digits change when an
  image is added, removed, renamed or written anew.
  """
  digest = hashlib.sha256(json.dumps([len(source), source.class_names]).encode())
  for part in source.contents():
    digest.update(part)
  return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
  """Image files root/name, decoded when asked for; `source[i]` raises UnreadableImage for a broken one."""
  root: str
  names: tuple
  labels: np.ndarray
  class_names: tuple
  total: int

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    return read_image(os.path.join(self.root, self.names[index])), int(self.labels[index])

  def contents(self):
    yield self.labels.astype('<i4').tobytes()
    yield json.dumps(self.names).encode()
    yield from digests([os.path.join(self.root, name) for name in self.names])


class TfdsSource:
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
      self._files = [str(file) for file in builder.info.splits[split].filepaths]
      held_out = 'validation' if 'validation' in builder.info.splits else 'test'
      self.total = sum(builder.info.splits[part].num_examples for part in ('train', held_out))
    except Exception as error:  # tfds raises its own kinds for missing splits, features, shards and file formats
      raise UserError(f'cannot read split {split!r} of {path}: {first_line(error)}; it needs features image and label, '
                      'prepared with file_format array_record') from error
    self._name = f'{path} ({split})'

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    return read_image(record['image'], name=f'{index} of {self._name}'), int(record['label'])

  def __reduce__(self):
    return TfdsSource, self._origin

  def contents(self):
    yield from digests([os.path.join(self._origin[0], 'dataset_info.json'), *self._files])


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
  train = _class_folders(train_root, classes)
  if not val_roots:
    return _hold_out(train, split)
  validation = _class_folders(val_roots[0], classes, train_root)
  return dataclasses.replace(train if split == 'train' else validation, total=len(train) + len(validation))


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
  return FolderSource(str(root), tuple(names), np.array(labels, np.int32), tuple(classes), len(names))


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
  for label in range(len(source.class_names)):
    members = np.flatnonzero(source.labels == label)
    ranked = sorted(members, key=lambda i: hashlib.blake2b(os.fsencode(source.names[i]), digest_size=8).digest())
    held = min(max(1, round(HELD_OUT * len(members))), len(members) - 1)
    keep[ranked[:held]] = True
  keep = keep if split == 'validation' else ~keep
  if not keep.any():
    raise UserError(f'every class in {source.root} has one image, none can be held out: add more, or a val/ folder')
  names = tuple(name for name, kept in zip(source.names, keep) if kept)
  return dataclasses.replace(source, names=names, labels=source.labels[keep])
