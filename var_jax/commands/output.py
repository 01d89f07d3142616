"""What commands leave: one picture, an .npz in the evaluators' layout, or a folder of PNGs."""

import contextlib
import pathlib

from var_jax import pictures, whole
from var_jax.data.files import SUFFIXES, image_files
from var_jax.data.images import MAX_PIXELS
from var_jax.errors import UserError

LONGEST_SIDE = {'.png': 2**31 - 1, '.jpg': 65_500, '.jpeg': 65_500, '.webp': 16_383}  # pixels that a format can store
PICTURES = tuple(LONGEST_SIDE)
OTHERS = (*SUFFIXES, '.avif', '.jxl', '.pdf', '.svg', '.npy', '.json', '.txt', '.zip', '.safetensors', '.mp4')


def suffix(out):
  """'.npz' or a picture's suffix, in small letters; '' for a folder, such as cfg1.5. UserError for other files."""
  found = pathlib.Path(out).suffix.lower()
  if found in (*PICTURES, '.npz'):
    return found
  if found in OTHERS and not pathlib.Path(out).is_dir():
    raise UserError(f'--out={out} has a suffix that is not known: use {", ".join(PICTURES)}, .npz, or a folder')
  return ''


def check(out, inputs=()):
  """Raises UserError early when `out` cannot be written, or is one of the files that are read, or their folder."""
  path = pathlib.Path(out)
  for file in map(pathlib.Path, inputs):
    if path.resolve() in (file.resolve(), file.resolve().parent):
      raise UserError(f'--out={out} would replace {file}, which is read: choose another --out')
  is_file = bool(suffix(out))
  if is_file and path.is_dir():
    raise UserError(f'--out={out} is a folder: name a file')
  if not is_file and path.is_file():
    raise UserError(f'--out={out} is a file: name a folder, or use a suffix such as .png')
  make_folder(path.parent if is_file else path)


def check_sheet(out, count, size, rows=0):
  """UserError when a `pictures.sheet` of `count` images of size (h, w) is too large for one file of this kind."""
  side = LONGEST_SIDE[suffix(out)]

  def fits(count):
    height, width = pictures.sheet_size(count, size, rows)
    return max(height, width) <= side and height * width <= MAX_PIXELS

  if not fits(count):
    most, too_many = 0, count
    while too_many - most > 1:
      middle = (most + too_many) // 2
      most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    raise UserError(f'{count} images do not fit into one {suffix(out)} file, {most} do: use --out=X.npz or a folder')


def check_folder(out, names):
  """UserError when a folder holds pictures that would not be replaced by those of these names."""
  others = [file.name for file in image_files(out) if file.name not in {f'{name}.png' for name in names}]
  if others:
    raise UserError(f'{out} holds other pictures, such as {others[0]}, and two results would mix: choose another '
                    '--out, or remove them')


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
  if suffix(out) == '.npz':
    save_arrays(path, arr_0=images_NxHxWx3, **arrays)
  elif suffix(out):
    with _writing(path):
      whole.file(path, lambda part: pictures.save(part, picture))
  else:
    for name, image in zip(names or pictures.names(len(images_NxHxWx3)), images_NxHxWx3):
      with _writing(path / f'{name}.png'):
        whole.file(path / f'{name}.png', lambda part: pictures.save(part, image))


def save_text(path, text):
  """Writes a text, whole or not at all."""
  with _writing(path):
    whole.text(path, text)


def save_arrays(path, **arrays):
  """Writes an .npz, whole or not at all."""
  with _writing(path):
    whole.arrays(path, **arrays)


@contextlib.contextmanager
def _writing(path):
  """Within, a file is written that --out names."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'could not write {path} ({reason}): free some space or choose another --out') from None
