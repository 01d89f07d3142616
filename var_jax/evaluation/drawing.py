"""Many samples to an .npz or a folder, batch by batch: in constant memory, and going on where a call stopped."""

import hashlib
import json
import os
import pathlib
import shutil
import zipfile

import numpy as np

from var_jax import pictures, whole
from var_jax import progress as progress_lib
from var_jax.data.files import image_files
from var_jax.errors import UserError, note
from var_jax.model import check_choices
from var_jax.training import processes


def draw(model, labels_N, seed, out, choices, batch_size=64):
  """Writes `out`, an .npz with arr_0 (N, H, W, 3) uint8, labels (N,) and tokens (N, L), drawn by `Model.sample`.

  choices: its keyword arguments. What is drawn is kept beside `out` until the file is whole; the same call takes it
  up, another one begins anew. Raises UserError when the disk is full; what was drawn is kept then as well.
  """
  out, labels_N = pathlib.Path(out), model.check_labels(labels_N)
  check_choices(**{name: choices[name] for name in ('cfg', 'top_k', 'top_p', 'temperature')})
  part, identity = out.with_name(f'.{out.name}.part'), ''
  if len(labels_N) > batch_size:  # what is done in one go cannot be taken up
    identity = _identity(model, labels_N, seed, choices, batch_size)
  if not processes.is_first():
    for _ in _batches(model, labels_N, seed, choices, batch_size, int(processes.from_first(0))):
      pass
    processes.wait(f'drawn {out}')
    return
  try:
    _draw(model, labels_N, seed, part, choices, batch_size, identity)
    npz = part / 'whole.npz'
    with zipfile.ZipFile(npz, 'w', zipfile.ZIP_STORED, allowZip64=True) as file:
      for name in ('arr_0', 'labels', 'tokens'):
        file.write(part / f'{name}.npy', f'{name}.npy')
    npz.replace(out)
    shutil.rmtree(part)
    processes.wait(f'drawn {out}')
  except OSError as error:
    raise UserError(f'could not write {out} ({error.strerror or error}): free some space and run the same command '
                    'again, it goes on where it stopped') from error
  finally:
    if not (part / 'progress.json').exists():  # nothing that could be taken up
      shutil.rmtree(part, ignore_errors=True)


def draw_to_folder(model, labels_N, seed, folder, choices, batch_size=64):
  """Writes 000000.png and so on into a folder, drawn by `Model.sample`; what `draw` says of its arguments holds.

  A folder that is not whole yet says in .drawn.json which call it is of: the same call goes on there. UserError for an
  unfinished one of another call, for pictures that would not be replaced, and when the disk is full.
  """
  folder, labels_N = pathlib.Path(folder), model.check_labels(labels_N)
  check_choices(**{name: choices[name] for name in ('cfg', 'top_k', 'top_p', 'temperature')})
  progress, identity = folder / '.drawn.json', _identity(model, labels_N, seed, choices, batch_size)
  first, count = processes.is_first(), len(labels_N)
  done = int(processes.from_first(_done_in_folder(folder, progress, identity, count) if first else 0))
  if done:
    note(f'{done} of {count} images are drawn already')
  try:
    if first:
      whole.text(progress, json.dumps({'identity': identity, 'done': done}))
    with progress_lib.bar(title='sampling', unit='image', total=count, initial=done, show=first) as bar:
      for start, end, drawn in _batches(model, labels_N, seed, choices, batch_size, done):
        if first:
          for name, image in zip(pictures.names(end - start, start), drawn.images):
            whole.file(folder / f'{name}.png', lambda part: pictures.save(part, image))
          whole.text(progress, json.dumps({'identity': identity, 'done': end}))
        bar.update(end - start)
    if first:
      progress.unlink()
  except OSError as error:
    raise UserError(f'could not write to {folder} ({error.strerror or error}): free some space and run the same '
                    'command again, it goes on where it stopped') from error


def _done_in_folder(folder, progress, identity, count):
  """How many images the same call has drawn into a folder. UserError when its pictures are others."""
  done, there = _done(progress, identity), {file.name for file in image_files(folder)}
  others = there - {f'{name}.png' for name in pictures.names(count)}
  if progress.exists() and _record(progress).get('identity') != identity:
    others = there
  if others:
    raise UserError(f'{folder} holds pictures of another call, such as {min(others)}, and two results would mix: '
                    'choose another --out, or remove them')
  missing = (i for i, name in enumerate(pictures.names(done)) if f'{name}.png' not in there)
  return next(missing, done)  # of pictures that were removed, the first is drawn again, and all that follow


def _draw(model, labels_N, seed, part, choices, batch_size, identity):
  """Fills the folder `part` with arr_0.npy, labels.npy and tokens.npy."""
  count, progress = len(labels_N), part / 'progress.json'
  done = int(processes.from_first(_done(progress, identity)))
  if not done:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    np.save(part / 'labels.npy', labels_N)
  else:
    note(f'{done} of {count} images are drawn already')
  pyramid, size = model.tokenizer.pyramid, model.tokenizer.image_size
  bar = progress_lib.bar(title='sampling', unit='image', total=count, initial=done)
  with (bar, _Rows(part / 'arr_0.npy', np.uint8, (count, *size, 3), done) as images,
        _Rows(part / 'tokens.npy', np.int32, (count, pyramid.length), done) as tokens):
    for start, end, drawn in _batches(model, labels_N, seed, choices, batch_size, done):
      images.append(drawn.images[:end - start])
      tokens.append(drawn.tokens[:end - start])
      whole.text(progress, json.dumps({'identity': identity, 'done': end}))
      bar.update(end - start)


def _batches(model, labels_N, seed, choices, batch_size, done):
  """(start, end, `Samples`) of each batch from image `done` on."""
  count = len(labels_N)
  for start in range(done, count, batch_size):
    end = min(start + batch_size, count)
    full = np.resize(labels_N[start:end], min(batch_size, count))  # the last batch too, or it would be compiled anew
    yield start, end, model.sample(full, seed, first=start, batch_size=batch_size, **choices)


class _Rows:
  """A .npy file that grows by rows, from row `done` on. Not mapped: that would crash on a full disk."""

  def __init__(self, path, dtype, shape, done):
    self._file = path.open('r+b' if done else 'wb')
    if done:
      np.lib.format.read_magic(self._file)
      np.lib.format.read_array_header_1_0(self._file)
      self._file.seek(done * int(np.prod(shape[1:])) * np.dtype(dtype).itemsize, os.SEEK_CUR)
    else:
      np.lib.format.write_array_header_1_0(
          self._file, {'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False, 'shape': shape})

  def append(self, rows):
    """Writes rows through to the disk."""
    self._file.write(np.ascontiguousarray(rows).tobytes())
    self._file.flush()
    os.fsync(self._file.fileno())

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    self._file.close()


def _identity(model, labels_N, seed, choices, batch_size):
  """A text that is the same for calls that draw the same."""
  labels = hashlib.sha256(labels_N.tobytes()).hexdigest()[:12]
  return f'{model.identity} {labels} {seed} {sorted(choices.items())} {batch_size}'


def _done(progress, identity):
  """How many images an earlier call of the same identity has drawn."""
  found = _record(progress)
  return found['done'] if identity and found.get('identity') == identity else 0


def _record(progress):
  try:
    found = json.loads(progress.read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) and isinstance(found.get('done'), int) else {}
