"""Sets of uint8 images read batch by batch, so that fifty thousand take no more memory than fifty.

    images = open_images('samples.npz')      # or a folder of pictures
    for batch in images.batches(64): ...     # (<=64, H, W, 3) uint8
"""

import contextlib
import pathlib
import zipfile
import zlib

import numpy as np

from var_jax.data import pipeline
from var_jax.data.arrays import npy_header
from var_jax.data.files import SUFFIXES, image_files
from var_jax.data.images import read_image
from var_jax.errors import UserError


def open_images(path):
  """NpzImages or FolderImages: `count`, `size` (height, width) and `batches(size)`. UserError for anything else."""
  path = pathlib.Path(path)
  if path.is_dir():
    return FolderImages(path)
  if not path.is_file():
    raise UserError(f'there is no {path}: give an .npz with arr_0, or a folder of images')
  return NpzImages(path)


class NpzImages:
  """`arr_0` (N, H, W, 3) uint8 of an .npz, the layout of the usual evaluators; compressed or not."""

  def __init__(self, path):
    self.path = path
    with self._opened() as (_, shape, dtype):
      if dtype != np.uint8:
        raise UserError(f'arr_0 in {path} is {dtype}: store uint8 images, 0 to 255')
      if len(shape) != 4 or shape[-1] != 3:
        raise UserError(f'arr_0 in {path} has the shape {shape}: store images as (N, H, W, 3)')
    self.count, self.size, self._shape = shape[0], shape[1:3], shape[1:]

  def batches(self, size):
    """Yields (<=size, H, W, 3) arrays in order."""
    with self._opened() as (file, _, _):
      for start in range(0, self.count, size):
        shape = (min(size, self.count - start), *self._shape)
        data = file.read(int(np.prod(shape)))
        if len(data) < np.prod(shape):
          raise UserError(f'{self.path} is truncated: write or download it again')
        yield np.frombuffer(data, np.uint8).reshape(shape)

  def _opened(self):
    return _NpyMember(self.path, 'arr_0')


class _NpyMember:
  """Context: (file behind the header, shape, dtype) of one array in an .npz."""

  def __init__(self, path, name):
    self._path, self._name = path, name

  def __enter__(self):
    try:
      self._zip = zipfile.ZipFile(self._path)
      self._file = self._zip.open(f'{self._name}.npy')
      shape, fortran_order, dtype = npy_header(self._file)
    except KeyError:
      raise UserError(f'{self._path} has no array {self._name}: give an .npz of images, or a folder') from None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
      raise UserError(f'{self._path} is truncated or no .npz file ({error}): write or download it again') from error
    if fortran_order:
      raise UserError(f'{self._name} in {self._path} is in Fortran order: save it with np.ascontiguousarray')
    return self._file, shape, dtype

  def __exit__(self, kind, error, traceback):
    self._file.close()
    self._zip.close()
    if kind is not None and issubclass(kind, (zipfile.BadZipFile, zlib.error, EOFError)):
      raise UserError(f'{self._path} is damaged ({error}): write or download it again') from error


class FolderImages:
  """The pictures in a folder and in folders within, in the order of their paths; all of one size."""

  def __init__(self, folder):
    self._files = image_files(folder)
    if not self._files:
      raise UserError(f'no images ({", ".join(SUFFIXES)}) in {folder}: give another folder, or an .npz')
    self.count, self.size = len(self._files), read_image(self._files[0]).shape[:2]

  def batches(self, size):
    """Yields (<=size, H, W, 3) arrays in order. UserError when a picture has another size than the first."""
    for start in range(0, self.count, size):
      images = []
      for file in self._files[start:start + size]:
        images.append(read_image(file))
        if images[-1].shape[:2] != self.size:
          raise UserError(f'{file} has {images[-1].shape[0]}x{images[-1].shape[1]} pixels, {self._files[0]} '
                          f'{self.size[0]}x{self.size[1]}: make all images one size')
      yield np.stack(images)


class ArrayImages:
  """Images in memory, (N, H, W, 3) uint8."""

  def __init__(self, images_NxHxWx3):
    self._images = images_NxHxWx3
    self.count, self.size = len(images_NxHxWx3), images_NxHxWx3.shape[1:3]

  def batches(self, size):
    """Yields (<=size, H, W, 3) arrays in order."""
    for start in range(0, self.count, size):
      yield self._images[start:start + size]


class SourceImages:
  """Images of a data source (see `data.sources`), whole and fitted to one size: each as it is read.

  index: which ones, None for all; workers: processes that decode, 0 for threads. Unreadable images are left out.
  """

  def __init__(self, source, size, index=None, workers=0):
    self._source = source if index is None else Subset(source, index)
    self.count, self.size, self._workers = len(self._source), tuple(size), workers

  def batches(self, size):
    """Yields (<=size, H, W, 3) arrays in order."""
    for images, _ in self.labelled(size):
      yield images

  def labelled(self, size):
    """Yields ((<=size, H, W, 3) uint8, (<=size,) int32 labels) in order."""
    batches = pipeline.eval_batches(
        self._source, batch_size=min(size, self.count), size=self.size, enlarge=1, workers=self._workers)
    with contextlib.closing(batches):
      for batch in batches:
        real = batch['mask'] > 0
        yield batch['image'][real], batch['label'][real]


class Subset:
  """The images of a source at the positions `index`, as a source."""

  def __init__(self, source, index):
    self._source, self._index = source, np.asarray(index)
    self.class_names, self.total = source.class_names, source.total

  def __len__(self):
    return len(self._index)

  def __getitem__(self, position):
    return self._source[int(self._index[position])]
