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
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from var_jax import whole
from var_jax.errors import UserError, first_line, note

TORCH_SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt')
SUFFIXES = ('.safetensors', '.npz', *TORCH_SUFFIXES)
INDEX = '.index.json'  # ends the name of the file that lists the parts of a model in several files
DTYPES = {  # of .safetensors
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
# Parts of names that PyTorch's wrappers put before, or into, those of the module that they wrap.
WRAPPERS = re.compile(
    r'(?:(?<=\.)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')


def read_tensors(path):
  """Mapping {name: np.ndarray} of a weight file, in its own dtypes, names and layouts.

  path: a .safetensors, .npz or PyTorch file, told by its content; or the .index.json of a model in several files; or a
  folder that has one such. Dicts within a PyTorch file are flattened to 'outer.inner' names; values that are no tensors
  are left out. Nothing from a file is ever executed. Raises UserError for a missing, truncated, foreign or
  code-carrying file.
  """
  path = pathlib.Path(path)
  path = _in_folder(path) if path.is_dir() else path
  if not path.is_file():
    place = '' if path.is_absolute() else f' in {pathlib.Path.cwd()}'
    raise UserError(f'there is no weight file {path}{place}: check the path, or download it first')
  tensors = _read_parts(path) if path.name.endswith(INDEX) else _reader(path)(path)
  if not tensors:
    raise UserError(f'{path} holds no tensors: is it the file with the weights?')
  return tensors


def inside(tensors, telling, path):
  """(one network's tensors by their own names, the prefix that these have in the file).

  A file can hold a network under model, state_dict, module, ema and so on, among other things, or as a wrapper names
  it. telling: names of tensors that the network has, before which the prefix stands. Of several prefixes that of
  averaged parameters (ema) is taken, and a note says so. Without any the tensors come back as they are.
  """
  names = {WRAPPERS.sub('', name): name for name in tensors}
  if len(names) < len(tensors):  # two of one name: leave them apart
    names = {name: name for name in tensors}
  # {prefix: the same with its wrappers}; not of an optimizer's moments
  found = {name.removesuffix(end): place.removesuffix(end) for name, place in names.items() for end in telling
           if f'.{name}'.endswith(f'.{end}') and not name.startswith('opt')}
  if not found:
    return tensors, ''
  prefix = next((prefix for prefix in found if 'ema' in prefix), min(found))
  if len(found) > 1:
    several = ', '.join(map(repr, sorted(found)))
    note(f'{path} holds the network more than once, under {several}: {prefix!r} is taken')
  return _Placed({name.removeprefix(prefix): (tensors, place) for name, place in names.items()
                  if name.startswith(prefix) and place.startswith(found[prefix])}), found[prefix]


class _Placed(Mapping):
  """Tensors that others hold, read when they are asked for. places: {name: (mapping, key in it)}."""

  def __init__(self, places):
    self._places = places

  def __getitem__(self, name):
    tensors, key = self._places[name]
    return tensors[key]

  def __iter__(self):
    return iter(self._places)

  def __len__(self):
    return len(self._places)


def write_tensors(path, tensors):
  """Writes {name: array} as `.safetensors`, or with PyTorch as `.pth`, whole or not at all. UserError on full disks."""
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

  def write(part):
    part.touch()
    mode = part.stat().st_mode  # what other files get; safetensors makes its own private
    if part.suffix in TORCH_SUFFIXES:
      import torch
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of read-only arrays, which nobody writes to
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, part)
    else:
      safetensors.numpy.save_file(tensors, part)
    part.chmod(mode)

  try:
    whole.file(path, write)
  except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
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
  return UserError(f'{path} is truncated or no weight file ({why}): download it again; weights are read from '
                   f'{", ".join(SUFFIXES)} files')


def _in_folder(folder):
  """The weight file of a folder: its index of parts, or else the only file."""
  try:
    names = sorted(folder.iterdir())
  except OSError as error:
    raise UserError(f'cannot look into {folder} ({error.strerror}): name the weight file itself') from error
  for suffixes in ((INDEX,), SUFFIXES[:1], SUFFIXES[1:]):
    files = [file for file in names if file.name.endswith(suffixes) and not file.name.startswith('.')]
    if len(files) > 1:
      raise UserError(f'{folder} has {len(files)} weight files, such as {files[0].name}: name the one to take')
    if files:
      return files[0]
  raise UserError(f'{folder} is a folder without weights ({", ".join(SUFFIXES)}): name the weight file')


def _read_parts(path):
  """The tensors of all files that an index names: {"weight_map": {tensor: file beside the index}}."""
  try:
    parts = json.loads(path.read_bytes())['weight_map']
    files = {name: path.with_name(name) for name in set(parts.values())}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise _broken(path, f'an index of parts without a weight_map: {first_line(error)}') from error
  if missing := sorted(name for name, file in files.items() if not file.is_file()):
    raise UserError(f'{path} names {len(files)} parts, and {missing[0]} is not there: download all of them')
  opened = {name: read_tensors(file) for name, file in files.items()}
  for name, part in parts.items():
    if name not in opened[part]:
      raise UserError(f'{path.with_name(part)} lacks {name}, which {path.name} says it has: download both again')
  return _Placed({name: (opened[part], name) for name, part in parts.items()})


def _reader(path):
  """What reads a file of that content. UserError where nothing does, such as for a web page."""
  with path.open('rb') as file:
    start = file.read(16)
  if start.startswith(b'version https:'):
    raise UserError(f'{path} is a pointer of git-lfs in place of the weights: run `git lfs pull` in its folder')
  if start[8:9] == b'{':  # behind the header's length, which can be any bytes
    return _read_safetensors
  if start[:2] == b'PK':
    return _zip_reader(path)
  if start[:1] == b'\x80':  # the first byte of a binary pickle, PyTorch's format before 1.6
    return _read_torch
  raise _broken(path, f'it starts with {start!r}' if start else 'it is empty')


def _zip_reader(path):
  try:
    with zipfile.ZipFile(path) as file:
      names = file.namelist()
  except Exception as error:  # zipfile fails in many ways on damaged files
    raise _broken(path, f'its zip directory cannot be read: {first_line(error)}') from error
  if any(name.endswith('data.pkl') for name in names):
    return _read_torch
  if names and not any(name.endswith('.npy') for name in names):
    raise _broken(path, f'a zip file of {names[0][:60]!r}; unpack it if the weights are inside')
  return _read_npz


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
      return {name: arrays[name] for name in arrays.files if isinstance(arrays[name], np.ndarray)}
  except Exception as error:  # NumPy and zipfile fail in every way there is on damaged files
    # An array of objects is a pickle, and so, to NumPy, is anything that it does not recognise.
    raise UserError(f'{path} is truncated, no .npz file, or holds pickled objects ({first_line(error)}): '
                    'download it again, or save it with plain arrays') from error


def _read_torch(path):
  try:
    import torch
  except ImportError as error:
    raise UserError(f"reading {path} needs PyTorch: pip install 'var_jax[torch]', or convert the file to "
                    '.safetensors elsewhere') from error
  try:
    # Only the zip format can be mapped; a mapped file is paged in tensor by tensor.
    loaded = torch.load(path, weights_only=True, map_location='cpu', mmap=zipfile.is_zipfile(path))
    return dict(_flatten(loaded, '', torch)) if isinstance(loaded, dict) else {}
  except UserError:
    raise
  except pickle.UnpicklingError as error:
    call = re.search(r'GLOBAL (\S+)', str(error))  # torch's own advice, to read it anyway, is no advice to pass on
    if call is None:
      raise _broken(path, 'its index cannot be read') from error
    raise UserError(f'{path} would call {call[1]} when read, so it holds more than weights and was not opened: '
                    'take it from a source with plain weights, or save its state_dict alone') from error
  except Exception as error:  # torch fails in every way there is on damaged files
    raise _broken(path, first_line(error)) from error


def _flatten(value, name, torch):
  """Yields (dotted name, array) for every tensor in nested dicts."""
  if isinstance(value, torch.Tensor):
    try:
      tensor = value.detach().cpu().contiguous()
      if tensor.dtype == torch.bfloat16:  # unknown to NumPy itself
        yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
      else:
        yield name, tensor.numpy()
    except (TypeError, RuntimeError) as error:  # quantized, sparse, without memory
      raise UserError(f'{name} is a tensor of {value.dtype}, {value.layout}, which is not supported: save it as plain '
                      'float32') from error
  elif isinstance(value, dict):
    for key, inner in value.items():
      yield from _flatten(inner, f'{name}.{key}' if name else str(key), torch)
