"""Folders of images by class: how a folder is laid out, what is held out, and what is said about it."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from var_jax.data.arrays import HELD_OUT
from var_jax.data.files import SUFFIXES, digests, listing, visible_folders
from var_jax.data.images import header_size, read_image
from var_jax.errors import UserError

ROLES = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val', 'eval': 'val',
         'test': 'test', 'testing': 'test'}  # what folders of these names hold, whatever their capitals
MEASURED = 20  # images whose sizes are looked at for a line about a set


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
  """Image files root/name, decoded when asked for; `source[i]` raises UnreadableImage for a broken one.

  total: the images of both parts; notes: lines that say how the folder was read.
  """
  root: str
  names: tuple
  labels: np.ndarray
  class_names: tuple
  total: int
  notes: tuple = ()

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    return read_image(os.path.join(self.root, self.names[index])), int(self.labels[index])

  def contents(self):
    yield self.labels.astype('<i4').tobytes()
    yield json.dumps(self.names).encode()
    yield from digests([os.path.join(self.root, name) for name in self.names])

  def sizes(self):
    """[(height, width)] of some of the images, by their headers."""
    some = sorted({int(i) for i in np.linspace(0, len(self) - 1, MEASURED)})
    return [size for i in some if (size := header_size(os.path.join(self.root, self.names[i])))]


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Where the parts of a set lie: train/CLASS and held_out/CLASS; held_out is None where it is taken from train."""
  train: pathlib.Path
  held_out: pathlib.Path | None
  notes: tuple


def open_folder(path, split):
  """FolderSource of one split of path/train/CLASS/**/*.jpg and path/val/CLASS, or of path/CLASS/**/*.jpg.

  Other names for the parts: see ROLES. Without a held-out part, 5 % of each class are held out.
  """
  root = pathlib.Path(path)
  if not root.is_dir():
    raise UserError(f'{root} is a file: give a folder with train/CLASS/*.jpg or CLASS/*.jpg')
  layout = _layout(root)
  classes = visible_folders(layout.train)
  if not classes:
    raise UserError(f'no class folders in {layout.train}: sort the images into {layout.train}/CLASS/*.jpg')
  train = _class_folders(layout.train, classes)
  notes = [*layout.notes, *train.notes]
  if layout.held_out is None:
    notes.append(f'held out: {100 * HELD_OUT:.0f} % of each class, the same ones always')
    return _hold_out(dataclasses.replace(train, notes=tuple(notes)), split)
  _check_same_classes(layout, classes)
  held_out = _class_folders(layout.held_out, classes)
  notes += held_out.notes
  if os.path.realpath(layout.held_out) == os.path.realpath(layout.train):
    notes.append(f'{layout.held_out} is the same folder as {layout.train}: what is measured there says nothing about '
                 'new images')
  return dataclasses.replace(train if split == 'train' else held_out, notes=tuple(notes),
                             total=len(train) + len(held_out))


def _layout(root):
  """The _Layout of a folder. UserError where its names can be meant in two ways."""
  folders = visible_folders(root)
  roles = _roles(folders)
  inner = {name: _inner(root / name) for name in roles}
  parts = {role: [name for name in roles if roles[name] == role and visible_folders(inner[name])]
           for role in ('train', 'val', 'test')}
  flat = [name for name in roles if name not in sum(parts.values(), [])]
  others = [name for name in folders if name not in roles]
  if not parts['train']:
    _check_classes(root, roles, parts, flat, others)
    return _Layout(root, None, ())
  for names in parts.values():
    if len(names) > 1:
      raise UserError(f'{root} holds {names[0]}/ and {names[1]}/, which may both be the same part: move one elsewhere')
  if flat_val := [name for name in flat if roles[name] == 'val']:
    place = root / flat_val[0]
    raise UserError(f'{place} has no class folders: sort its images into {place}/CLASS/ as in {root / parts["train"][0]}'
                    " (for ImageNet's, valprep.sh of github.com/soumith/imagenetloader.torch does that), or move it "
                    'elsewhere, so that 5 % of each class are held out')
  held_out = (parts['val'] or parts['test'] or [None])[0]
  unread = [name for name in (*flat, *parts['test'], *others) if name != held_out]
  notes = [f'held out: {root / held_out}'] if held_out else []
  unread = [f'{root / name}' for name in unread]
  if beside := len(listing(root, deep=False).names):
    unread.append(f'images in {root} itself ({beside:,})')
  if unread:
    notes.append(f'not read: {_some(unread)}')
  return _Layout(inner[parts['train'][0]], inner[held_out] if held_out else None, tuple(notes))


def _roles(folders):
  """{name: 'train', 'val' or 'test'} of the folders that are named like parts of a set.

  Names such as training_set count where all folders have such names: beside others they may be a class's.
  """
  words = {name: {ROLES[word] for word in re.findall('[a-z]+', name.lower()) if word in ROLES} for name in folders}
  if len(folders) > 1 and all(len(found) == 1 for found in words.values()) and {'train'} in words.values():
    return {name: found.pop() for name, found in words.items()}
  return {name: ROLES[name.lower()] for name in folders if name.lower() in ROLES}


def _inner(folder):
  """The folder, or for part/part/CLASS, as archives unpack, the one within."""
  within = visible_folders(folder)
  if len(within) == 1 and within[0].lower() == folder.name.lower() and visible_folders(folder / within[0]):
    return folder / within[0]
  return folder


def _check_classes(root, roles, parts, flat, others):
  """UserError unless the folders in root can be classes, although some are named like parts of a set."""
  held_out = [*parts['val'], *parts['test'], *(name for name in flat if roles[name] != 'train')]
  if held_out:
    raise UserError(f'{root / held_out[0]} has no train/ beside it: move the training images to {root / "train"}/CLASS; '
                    f'where {held_out[0]} is a class, move it there too')
  if flat and not others:
    raise UserError(f'no class folders in {root / flat[0]}: sort the images into {root / flat[0]}/CLASS/*.jpg')
  for name in others:
    within = {ROLES[inner.lower()]: inner for inner in visible_folders(root / name) if inner.lower() in ROLES}
    if 'train' in within and len(within) > 1:
      way = (f'give {root / name} as the path' if len(others) == 1 else
             f'move them to {root / within["train"] / name} and so on')
      raise UserError(f'{root / name} holds {" and ".join(f"{inner}/" for inner in within.values())}, parts of a set, '
                      f'and not the images of a class: {way}')


def _check_same_classes(layout, classes):
  odd = sorted(set(classes) ^ set(visible_folders(layout.held_out)))
  if odd:
    raise UserError(f'{layout.held_out} and {layout.train} differ in classes ({", ".join(odd[:5])}): give both the same '
                    f'folders, or move {layout.held_out} elsewhere, so that 5 % of each class are held out')


def _class_folders(root, classes):
  """FolderSource of the images in root/CLASS."""
  names, labels, places, left_out = [], [], {}, collections.Counter()
  notes = []
  for label, name in enumerate(classes):
    found = listing(root, name)
    left_out += found.left_out
    if not found.names:
      raise UserError(f'no images ({", ".join(SUFFIXES)}) in {root / name}: add some or remove the folder'
                      + (f'; it holds {_counts(found.left_out)}' if found.left_out else ''))
    names += found.names
    labels += [label] * len(found.names)
    twin = places.setdefault(os.path.realpath(root / name), name)
    if twin != name:
      notes.append(f'the classes {twin} and {name} are one folder')
  beside = listing(root, deep=False)
  left_out += beside.left_out + collections.Counter({'images in no class folder': len(beside.names)})
  if left_out:
    notes.append(f'left out in {root}: {_counts(left_out)}')
  if len(classes) == 1 and len({name.split('/')[1] for name in names if name.count('/') > 1}) > 1:
    notes.append(f'one class alone: for a class of each folder in {root / classes[0]}, give that as the path')
  return FolderSource(str(root), tuple(names), np.array(labels, np.int32), tuple(classes), len(names), tuple(notes))


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


def _counts(left_out):
  """Counter -> '.txt (120), @eaDir/ (3)'."""
  return _some([f'{what} ({count:,})' for what, count in left_out.most_common()], 12)


def _some(things, most=5):
  return ', '.join(things[:most]) + (f' and {len(things) - most} more' if len(things) > most else '')
