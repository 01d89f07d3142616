"""Weight files of other projects as flat {name: array}; no model knows about file formats.

    tensors = read_tensors('vae_ch160v4096z32.pth')
    tensors = match_shapes(tensors, {'conv.weight': (64, 3, 3, 3)}, 'LPIPS')
"""

import json
import pathlib
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from var_jax.errors import UserError, first_line

TORCH_SUFFIXES = ('.pth', '.pt')
DTYPES = {  # of .safetensors
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}


def read_tensors(path):
  """Mapping {name: np.ndarray} of a `.safetensors`, `.npz`, `.pth` or `.pt` file, in its own dtypes, names and layouts.

  Dicts within a PyTorch file are flattened to 'outer.inner' names; values that are no tensors are left out. Nothing
  from a file is ever executed. Raises UserError for a missing, truncated, foreign or code-carrying file.
  """
  path = pathlib.Path(path)
  readers = {'.safetensors': _read_safetensors, '.npz': _read_npz, **dict.fromkeys(TORCH_SUFFIXES, _read_torch)}
  if path.suffix not in readers:
    raise UserError(f'{path} has suffix {path.suffix!r}: weights are read from {", ".join(readers)} files')
  if not path.is_file():
    raise UserError(f'there is no weight file {path}: check the path, or download it first')
  tensors = readers[path.suffix](path)
  if not tensors:
    raise UserError(f'{path} holds no tensors: is it the file with the weights?')
  return tensors


def write_tensors(path, tensors):
  """Writes {name: array} as `.safetensors`, or with PyTorch as `.pth`, whole or not at all. UserError on full disks."""
  path = pathlib.Path(path)
  part = path.with_name(f'.part_{path.name}')
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  try:
    part.touch()
    mode = part.stat().st_mode  # what other files get; safetensors makes its own private
    if path.suffix in TORCH_SUFFIXES:
      import torch
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of read-only arrays, which nobody writes to
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, part)
    else:
      safetensors.numpy.save_file(tensors, part)
    part.chmod(mode)
    part.replace(path)
  except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
    part.unlink(missing_ok=True)
    raise UserError(f'could not write {path} ({first_line(error)}): free some space, or choose another '
                    'folder') from error


def match_shapes(tensors, shapes, what, hint='check that the file belongs to this model'):
  """The tensors named in shapes {name: shape}, after exact accounting.

  `what` names the model for the message. Raises UserError that names each missing, unexpected or misshapen tensor
  (the first few of each kind, with their number).
  """
  missing = [name for name in shapes if name not in tensors]
  extra = [name for name in tensors if name not in shapes]
  misshapen = [f'{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}' for name, shape in shapes.items()
               if name in tensors and tuple(tensors[name].shape) != tuple(shape)]
  problems = [_some(title, names) for title, names in
              (('missing', missing), ('unexpected', extra), ('misshapen', misshapen)) if names]
  if problems:
    raise UserError(f'these are not the weights of {what}: {"; ".join(problems)}: {hint}')
  return {name: tensors[name] for name in shapes}


def _some(title, names, limit=6):
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return f'{title} {", ".join(names[:limit])}{more}'


def _broken(path, why):
  return UserError(f'{path} is truncated or no weight file ({why}): download it again')


def _read_safetensors(path):
  try:
    with safetensors.safe_open(path, 'np'):  # checks the index against the file's length
      pass
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise _broken(path, first_line(error)) from error
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    index = json.loads(file.read(length))
  index.pop('__metadata__', None)
  for name, entry in index.items():
    if entry['dtype'] not in DTYPES:
      raise UserError(f'{path} holds {name} as {entry["dtype"]}, which is not supported: save it as float32')
  return _Mapped(path, index, 8 + length)


class _Mapped(Mapping):
  """Tensors of a .safetensors file, mapped into memory only as long as somebody holds them: files can be large."""

  def __init__(self, path, index, start):
    self._path, self._index, self._start = path, index, start

  def __getitem__(self, name):
    entry = self._index[name]
    dtype, shape = DTYPES[entry['dtype']], tuple(entry['shape'])
    if not all(shape):
      return np.zeros(shape, dtype)
    return np.memmap(self._path, dtype, 'r', self._start + entry['data_offsets'][0], shape)

  def __iter__(self):
    return iter(self._index)

  def __len__(self):
    return len(self._index)


def _read_npz(path):
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:
    # An array of objects is a pickle, and so, to NumPy, is anything that it does not recognise.
    raise UserError(f'{path} is truncated, no .npz file, or holds pickled objects ({first_line(error)}): '
                    'download it again, or save it with plain arrays') from error


def _read_torch(path):
  _check_torch_header(path)
  try:
    import torch
  except ImportError as error:
    raise UserError(f"reading {path} needs PyTorch: pip install 'var_jax[torch]', or convert the file to "
                    '.safetensors elsewhere') from error
  try:
    # Only the zip format can be mapped; a mapped file is paged in tensor by tensor.
    loaded = torch.load(path, weights_only=True, map_location='cpu', mmap=zipfile.is_zipfile(path))
  except pickle.UnpicklingError as error:
    call = re.search(r'GLOBAL (\S+)', str(error))  # torch's own advice, to read it anyway, is no advice to pass on
    if call is None:
      raise _broken(path, 'its index cannot be read') from error
    raise UserError(f'{path} would call {call[1]} when read, so it holds more than weights and was not opened: '
                    'take it from a source with plain weights, or save its state_dict alone') from error
  except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
    raise _broken(path, first_line(error)) from error
  return dict(_flatten(loaded, '', torch)) if isinstance(loaded, dict) else {}


def _check_torch_header(path):
  """UserError for a web page or a cut-off download, so that neither needs PyTorch to be told from weights."""
  with path.open('rb') as file:
    start = file.read(16)
  if start[:4] == b'PK\x03\x04':
    if not zipfile.is_zipfile(path):
      raise _broken(path, 'its zip directory is missing')
  elif start[:1] != b'\x80':  # the first byte of a binary pickle, the format before PyTorch 1.6
    raise _broken(path, f'it starts with {start!r}' if start else 'it is empty')


def _flatten(value, name, torch):
  """Yields (dotted name, array) for every tensor in nested dicts."""
  if isinstance(value, torch.Tensor):
    tensor = value.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy itself
      yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
      yield name, tensor.numpy()
  elif isinstance(value, dict):
    for key, inner in value.items():
      yield from _flatten(inner, f'{name}.{key}' if name else str(key), torch)
