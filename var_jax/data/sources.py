"""Random-access sources of labelled images: `len(source)`, `source[i] -> (uint8 (H, W, 3), int label)`.

Each has `class_names`, a tuple of str; `total`, the images of training and held-out part together; `notes`, lines that
say how it was read; `sizes()`, the (height, width) of some images where that is cheap; `contents()`, bytes that tell
its images from others, for `identity`. Each can be pickled for grain's worker processes. Which images are held out for
validation never depends on listing order, seed or process.
"""

import hashlib
import json
import os

import numpy as np

from var_jax.data.arrays import open_arrays, open_digits
from var_jax.data.files import digests
from var_jax.data.folders import open_folder
from var_jax.data.images import read_image
from var_jax.data.tokens import TokenSource
from var_jax.errors import UserError, first_line

SPLITS = ('train', 'validation')
KINDS = ('digits', 'folder', 'arrays', 'tfds', 'tokens')
NAMED = 10  # classes that a line about a set names


def moved(config, place):
  """A config with its data elsewhere: 'PATH', or 'KIND:PATH' for another kind of data, such as folder:/data/photos."""
  kind, _, path = place.partition(':') if place.partition(':')[0] in KINDS else ('', '', place)
  config = config.copy_and_resolve_references().unlock()
  config.data.update(path=path, **({'source': kind} if kind else {}))
  return config.lock()


def open_source(kind, path=None, split='train', tokens=False):
  """Source of a kind: 'digits' (no path), 'folder', 'arrays' (.npz or folder of IDX files) or 'tfds' (prepared data).

  split: 'train' or 'validation'. tokens: whether 'tokens' will do in place of images. Raises UserError when kind or
  split is unknown, or path does not hold such data.
  """
  kinds = dict(zip(KINDS, (open_digits, open_folder, open_arrays, TfdsSource, TokenSource)))
  if kind not in kinds:
    raise UserError(f'unknown kind of data {kind!r}: use one of {", ".join(KINDS)}')
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


def summary(train, validation):
  """What a set was read as, in some lines: images, sizes, classes, what was left out and why."""
  names, sizes = train.class_names, train.sizes()
  counts = np.bincount(train.labels, minlength=len(names)) if hasattr(train, 'labels') else [None] * len(names)
  some = [name if count is None else f'{name} ({count:,})' for name, count in zip(names[:NAMED], counts)]
  lines = [f'data: {len(train):,} images to train on, {len(validation):,} held out{_range(sizes)}',
           f'{len(names):,} class{"es" * (len(names) > 1)}: {", ".join(some)}{", …" * (len(names) > NAMED)}']
  if odd := [(label, name) for label, name in enumerate(names) if name.isdecimal() and name != str(label)]:
    lines.append(f"the classes' names are numbers, but not their labels: {odd[0][1]} has the label {odd[0][0]}")
  return '\n'.join([*lines, *train.notes])


def _range(sizes):
  """', of 32x32 pixels' of [(height, width)]."""
  if not sizes:
    return ''
  least, most = (f'{height}x{width}' for height, width in (choose(sizes, key=np.prod) for choose in (min, max)))
  return f', of {least} pixels' if least == most else f', of {least} to {most} pixels (height x width)'


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
      parts = {'train', held_out} & set(builder.info.splits)
      self.total = sum(builder.info.splits[part].num_examples for part in parts)
      self.notes = (f'held out: the split {held_out!r}',)
    except Exception as error:  # tfds raises its own kinds for missing splits, features, shards and file formats
      raise UserError(f'cannot read split {split!r} of {path}: {first_line(error)}; it needs features image and label, '
                      'prepared with file_format array_record') from error
    self._name = f'{path} ({split})'

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    return read_image(record['image'], name=f'{index} of {self._name}'), int(record['label'])

  def sizes(self):
    return []

  def __reduce__(self):
    return TfdsSource, self._origin

  def contents(self):
    yield from digests([os.path.join(self._origin[0], 'dataset_info.json'), *self._files])
