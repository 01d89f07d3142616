"""What commands leave: one picture, an .npz in the evaluators' layout, or a folder of PNGs."""

import pathlib

import numpy as np

from var_jax import pictures
from var_jax.errors import UserError

PICTURES = ('.png', '.jpg', '.jpeg', '.webp')


def check(out, inputs=()):
  """Raises UserError early when `out` cannot be written, or is one of the files that are read, or their folder."""
  path = pathlib.Path(out)
  for file in map(pathlib.Path, inputs):
    if path.resolve() in (file.resolve(), file.resolve().parent):
      raise UserError(f'--out={out} would replace {file}, which is read: choose another --out')
  if path.suffix.lower() not in (*PICTURES, '.npz', ''):
    raise UserError(f'--out={out} has a suffix that is not known: use .png, .npz, or a folder without one')
  if path.suffix and path.is_dir():
    raise UserError(f'--out={out} is a folder: name a file')
  if not path.suffix and path.is_file():
    raise UserError(f'--out={out} is a file: name a folder, or use a suffix such as .png')
  make_folder(path.parent if path.suffix else path)


def make_folder(folder, flag='--out'):
  """Makes a folder for output. UserError when that, or a file in it, cannot be written. flag: what named it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '.var_jax_can_write').touch()
    (folder / '.var_jax_can_write').unlink()
  except OSError as error:
    raise UserError(f'cannot write to {folder} ({error.strerror}): choose another {flag}') from None


def save(out, images_NxHxWx3, picture, *, names=None, **arrays):
  """Writes (N, H, W, 3) uint8 images; an .npz has them as arr_0 beside `arrays`. picture: what a .png shows.

  names: of the files in a folder, numbers by default. Files appear whole or not at all: what was there stays when the
  disk is full.
  """
  path = pathlib.Path(out)
  if path.suffix.lower() == '.npz':
    save_arrays(path, arr_0=images_NxHxWx3, **arrays)
  elif path.suffix:
    _whole(path, lambda part: pictures.save(part, picture))
  else:
    for name, image in zip(names or [f'{i:06d}' for i in range(len(images_NxHxWx3))], images_NxHxWx3):
      _whole(path / f'{name}.png', lambda part: pictures.save(part, image))


def save_text(path, text):
  """Writes a text, whole or not at all."""
  _whole(pathlib.Path(path), lambda part: part.write_text(text))


def save_arrays(path, **arrays):
  """Writes an .npz, whole or not at all."""
  _whole(pathlib.Path(path), lambda part: np.savez(part, **arrays))


def _whole(path, write):
  part = path.with_name(f'.part_{path.name}')
  try:
    write(part)
    part.replace(path)
  except OSError as error:
    part.unlink(missing_ok=True)
    reason = error.strerror or error
    raise UserError(f'could not write {path} ({reason}): free some space or choose another --out') from None
