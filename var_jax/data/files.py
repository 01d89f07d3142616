"""The image files below a folder: the one listing by which every split and every flag reads them."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import heapq
import os
import pathlib

from var_jax.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
            '.pnm')
NOT_THE_USERS = {  # folders that storage devices and archives leave beside images, in small letters
    '@eadir', '@tmp', '@recycle', '@recently-snapshot', '@__thumb', '#recycle', '#snapshot', '__macosx', '__pycache__',
    '$recycle.bin', 'system volume information'}

PIECE = 4096       # bytes
PIECES = 4         # that are read of a longer file
READERS = 16       # threads: the files of a network file system are slow one by one, not together
AT_A_TIME = 4096   # files given to them at once


@dataclasses.dataclass(frozen=True)
class Listing:
  """Image files below root, as sorted names relative to it, with forward slashes.

  left_out: Counter of what else is there, such as {'.txt': 3, '@eaDir/': 1}.
  """
  root: str
  names: tuple
  left_out: collections.Counter

  @property
  def paths(self):
    return [os.path.join(self.root, name) for name in self.names]


def listing(root, inside='', deep=True):
  """Listing of the images in root/inside and, if deep, in all folders within. Names are relative to root.

  Links are followed, into each folder once: where several paths lead to one folder, its images have the path without
  links, or the first in alphabetical order. Left out are hidden files and folders, what storage devices leave, folders
  that are named like images, and files of other kinds. UserError for a folder that cannot be read, and for a link
  without suffix that leads nowhere.
  """
  names, left_out, seen = [], collections.Counter(), set()
  tops = [os.path.realpath(os.path.join(root, place)) for place in ('', inside)]
  folders, links = [(inside, tops[1])], []  # (name, real path)
  while folders or links:
    name, real = folders.pop() if folders else heapq.heappop(links)
    if real in seen:
      left_out['links to folders that are read already'] += 1
      continue
    seen.add(real)
    for entry in entries(os.path.join(root, name)):
      inner = f'{name}/{entry.name}' if name else entry.name
      if (reason := _why_not(entry)) is not None:
        left_out[reason] += 1
      elif not is_folder(entry):
        names.append(inner)
      elif not deep:
        continue
      elif not entry.is_symlink():
        folders.append((inner, os.path.join(real, entry.name)))
      elif any(_is_within(place, os.path.realpath(entry.path)) for place in (real, *tops)):
        left_out['links to a folder around them'] += 1
      else:
        heapq.heappush(links, (inner, os.path.realpath(entry.path)))
  del left_out['']
  return Listing(str(root), tuple(sorted(names)), left_out)


def entries(folder):
  """os.DirEntry of what is in a folder, by name. UserError where it cannot be read."""
  try:
    with os.scandir(folder) as found:
      return sorted(found, key=lambda entry: entry.name)
  except OSError as error:
    raise UserError(f'cannot read the folder {folder} ({error.strerror}): make it readable, or move it elsewhere if '
                    'its images are not wanted') from None


def is_folder(entry):
  """Whether an entry is a folder or a link to one. UserError for a link that was to lead to one, and does not."""
  try:
    if entry.is_dir():
      return True
  except OSError:
    pass
  if entry.is_symlink() and not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path):
    raise UserError(f'{entry.path} is a link to {os.readlink(entry.path)}, which cannot be reached: mount or restore '
                    'that, or remove the link')
  return False


def visible_folders(folder):
  """Sorted names of the folders in a folder, without those that `listing` leaves out."""
  return [entry.name for entry in entries(folder) if _why_not(entry) is None and is_folder(entry)]


def _why_not(entry):
  """What an entry is counted as when it is left out; '' where that is not worth a word, None where it is read."""
  name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()
  if name.startswith('.'):
    if entry.is_dir(follow_symlinks=False):
      return f'{name}/'
    return 'hidden images' if suffix in SUFFIXES else ''
  if name.lower() in NOT_THE_USERS:
    return f'{name}/'
  if is_folder(entry):
    return 'folders named like images' if suffix in SUFFIXES else None
  if suffix not in SUFFIXES:
    return suffix or 'files without suffix'
  if not entry.is_symlink() and not entry.is_file():
    return 'pipes or devices'  # reading one would wait for ever
  return None


def _is_within(place, folder):
  """Whether a real path is a folder or lies in it: a link from there to that folder leads in a circle."""
  return os.path.join(place, '').startswith(os.path.join(folder, ''))


def image_files(folder):
  """Paths of the images in a folder and in folders within, in the order of their paths; [] where it is no folder."""
  return sorted(map(pathlib.Path, listing(folder).paths)) if os.path.isdir(folder) else []


def images_named(texts):
  """Paths of the images that a flag names: a list of texts, each a FILE or DIR, or several with commas between.

  A name may hold commas itself: the longest part of a text that exists is taken as a name. UserError for a folder
  without images. Files need not exist.
  """
  files = []
  for text in texts:
    parts = text.split(',')
    while parts:
      count = next((n for n in range(len(parts), 1, -1) if os.path.exists(','.join(parts[:n]))), 1)
      path, parts = pathlib.Path(','.join(parts[:count])), parts[count:]
      inside = image_files(path)
      if path.is_dir() and not inside:
        raise UserError(f'no images ({", ".join(SUFFIXES)}) in {path}: name another folder')
      files += inside or [path]
  return files


def digests(paths):
  """Yields for each file 16 bytes that tell its content from others'.

  A file of up to 16 KiB is read whole. Of a longer one, its length and four pieces are: the first, the last and two
  between. Compressed images that differ anywhere differ in these. A file that cannot be read has a digest too.
  """
  with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
    for start in range(0, len(paths), AT_A_TIME):
      yield from readers.map(_digest, paths[start:start + AT_A_TIME])


def _digest(path):
  digest = hashlib.blake2b(digest_size=16)
  try:
    with open(path, 'rb', buffering=0) as file:
      size = os.fstat(file.fileno()).st_size
      digest.update(b'%d ' % size)
      if size <= PIECE * PIECES:
        digest.update(file.read())
      else:
        for i in range(PIECES):
          file.seek((size - PIECE) * i // (PIECES - 1))
          digest.update(file.read(PIECE))
  except OSError:
    digest.update(b'unreadable')
  return digest.digest()
