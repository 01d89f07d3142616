"""Token pyramids of a data set, made once: a generator's training then reads them instead of running the encoder.

A folder holds `tokens.json`, which says how they were made, and for each split its shards, such as
train-00003-of-00129.array_record: a record for each image, in the order of its source, of its label and of the tokens
of each of its crops, coarse to fine.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import uuid

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from var_jax import whole
from var_jax.data.files import digests
from var_jax.data.images import UnreadableImage
from var_jax.errors import UserError, first_line

DESCRIPTION = 'tokens.json'
PER_SHARD = 10_000  # images


class TokenSource:
  """`len(source)`, `source[i] -> (tokens (crops, L) int32, label)` of the images of one split.

  fingerprint: of the parameters of the tokenizer that made them; scales: of its pyramid. UserError for a folder that is
  not whole.
  """
  notes = ()

  def __init__(self, path, split):
    from grain.sources import ArrayRecordDataSource

    try:
      made = json.loads((pathlib.Path(path) / DESCRIPTION).read_text())
      self.fingerprint, self.class_names, self._codes = made['tokenizer'], tuple(made['classes']), made['codes']
      self.scales = tuple(map(tuple, made['scales']))
      self._shape = made['crops'] if split == 'train' else 1, sum(height * width for height, width in self.scales)
      files = [pathlib.Path(path) / name for name in shard_names(split, made[split])]
      self.total = made['train'] + made['validation']
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f'cannot use {path} as tokens ({str(error) or type(error).__name__}): give a folder that '
                      '`var-jax tokenize` has made') from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
      raise UserError(f'{len(missing)} of {len(files)} files are missing in {path}, such as {missing[0]}: run '
                      '`var-jax tokenize` again, it goes on from there')
    self._files = [str(file) for file in files]
    try:
      self._records = ArrayRecordDataSource(self._files)
      if len(self._records) != made[split]:
        raise ValueError(f'they hold {len(self._records)} images and not {made[split]}')
      self[len(self) - 1]
    except Exception as error:  # whatever array_record raises for damaged files
      raise UserError(f'cannot read the {split} tokens in {path} ({" ".join(str(error).split())[:200]}): remove the '
                      f'{split}-* files and run `var-jax tokenize` again') from error

  def __len__(self):
    return len(self._records)

  @functools.cached_property
  def _labels(self):
    return np.array([self[index][1] for index in range(len(self))], np.int32)

  def read_labels(self):
    """(N,) int32; the first call reads every record."""
    return self._labels

  def __getitem__(self, index):
    try:
      record = self._records[index]
      tokens_CxL = np.frombuffer(record, token_type(self._codes), offset=4).reshape(self._shape)
      return tokens_CxL.astype(np.int32), int(np.frombuffer(record, np.int32, 1)[0])
    except (RuntimeError, ValueError) as error:  # array_record's, and of a record that is too short
      file = self._files[min(index // PER_SHARD, len(self._files) - 1)]
      raise UserError(f'{file} is damaged ({first_line(error)}): remove it and run `var-jax tokenize` again, which '
                      'makes what is missing') from error

  def sizes(self):
    return []

  def contents(self):
    yield from digests([str(pathlib.Path(self._files[0]).with_name(DESCRIPTION)), *self._files])


def token_type(codes):
  return np.uint16 if codes <= 2**16 else np.uint32


def shard_names(split, images):
  """Names of the files of a split with so many images."""
  count = -(-images // PER_SHARD)
  return [f'{split}-{i:05d}-of-{count:05d}.array_record' for i in range(count)]


def name_of(source):
  """12 hexadecimal digits over three images: by them earlier commits told a source from others."""
  digest = hashlib.sha256()
  for index in (0, len(source) // 2, len(source) - 1):
    try:
      image, label = source[index]
      digest.update(np.ascontiguousarray(image).tobytes() + str(label).encode())
    except UnreadableImage:
      digest.update(b'unreadable')
  return digest.hexdigest()[:12]


def describe(folder, made):
  """Writes how the tokens in a folder are made. UserError when it holds others."""
  path = pathlib.Path(folder) / DESCRIPTION
  made = json.loads(json.dumps(made))
  if not path.exists():
    whole.text(path, json.dumps(made, indent=2) + '\n')
    return
  try:
    old = json.loads(path.read_text())
    if 'data' not in old:  # of an earlier commit
      old['data'] = made['data']
    differing = [name for name in made if old[name] != made[name]]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} cannot be used ({error}): remove that folder, or use another --out') from error
  if differing:
    raise UserError(f'{folder} holds other tokens ({", ".join(differing)} is another): use another --out, or the same '
                    'settings')


def write_shard(path, rows, codes):
  """Writes a file of rows (tokens (crops, L), label), whole or not at all."""
  temporary = path.with_name(f'.{uuid.uuid4().hex}')
  try:
    with _writing(path):
      writer = ArrayRecordWriter(str(temporary), 'group_size:1')
    for tokens_CxL, label in rows:
      with _writing(path):
        writer.write(np.int32(label).tobytes() + tokens_CxL.astype(token_type(codes)).tobytes())
    with _writing(path):
      writer.close()
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path):
  try:
    yield
  except RuntimeError as error:  # array_record's, for a full disk as well
    raise UserError(f'could not write {path} ({" ".join(str(error).split())[:200]}): free some space and run the same '
                    'command again, it goes on from there') from error
