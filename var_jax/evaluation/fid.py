"""FID and its kin: what samples and a reference have in common in the features of a network.

    extractor = inception_extractor('pt_inception.pth', 'tf1')
    reference = gather(open_images('reference.npz'), extractor)
    figures = compare(gather(open_images('samples.npz'), extractor), reference)
"""

import contextlib
import functools
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from var_jax import progress, whole
from var_jax.data import pipeline
from var_jax.errors import UserError, note
from var_jax.evaluation import frechet, inception, measures
from var_jax.training import mesh as mesh_lib
from var_jax.training import processes

PER_DEVICE = 32  # images at a time, at most
FEW = 2048  # features of the FID Inception: the covariance of fewer images is singular


class Extractor(NamedTuple):
  """run: uint8 images (B, H, W, 3) -> {'pool': (B, D), perhaps 'spatial': (B, E) and 'logits': (B, C)}.

  Of several processes each calls it with the same images. run_share: where there is one, each calls it with its own
  part of a batch of `pipeline.eval_batches`, and all get the features of its images that are not masked.
  """

  run: Callable
  mesh: Any = None
  run_share: Callable | None = None

  @property
  def devices(self):
    """Batches are multiples of that."""
    return 1 if self.mesh is None else self.mesh.size


class Gathered(NamedTuple):
  """What is kept of a set of images: statistics of pool and spatial features, and the rows that figures need."""

  count: int
  pool: tuple  # mean, covariance
  spatial: tuple | None = None
  pool_NxD: Any = None
  logits_NxC: Any = None


def inception_extractor(weights, resize):
  """Extractor of the FID Inception, over all devices. weights: a file, see `inception.load`."""
  mesh = mesh_lib.make_mesh()
  params = mesh_lib.put_state(inception.load(weights), mesh)

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
  def features(params, images, mask_B):
    found = inception.features(params, images, resize)
    return {'pool': found['pool'], 'spatial': found['spatial'], 'logits': found['logits_unbiased']}, mask_B

  def run(images):
    found, _ = features(params, *(mesh_lib.put_whole(x, mesh) for x in (images, np.ones(len(images), np.float32))))
    return jax.tree.map(np.asarray, found)

  def run_share(batch):
    parts = mesh_lib.put_batch({name: batch[name] for name in ('image', 'mask')}, mesh)
    found, mask_B = jax.tree.map(np.asarray, features(params, parts['image'], parts['mask']))
    return {name: rows[mask_B > 0] for name, rows in found.items()}

  return Extractor(run, mesh, run_share)


def judge_extractor(judge):
  """Extractor of a classifier that was trained on the real images (see `judge`): its hidden layer."""
  return Extractor(lambda images: {'pool': judge.features(images)})


class Gathering:
  """Takes in `count` images batch by batch and gives a `Gathered`. batch_size: what the features are computed in.

  most: None to keep a row for each image; else so many rows at most, evenly distant, and no logits.
  """

  def __init__(self, extractor, count, most=None):
    devices = extractor.devices
    self.batch_size = min(PER_DEVICE, -(-count // devices)) * devices
    self._extractor, self._moments, self._rows, self._taken, self._kept = extractor, {}, {}, 0, None
    if most is not None:
      self._kept = np.linspace(0, count - 1, min(count, most)).astype(int)

  def add(self, images_BxHxWx3):
    """uint8 images, any number of them."""
    size = self.batch_size
    for start in range(0, len(images_BxHxWx3), size):
      batch = images_BxHxWx3[start:start + size]
      full = np.resize(batch, (size, *batch.shape[1:]))  # one shape, one compilation
      self.take({name: features[:len(batch)] for name, features in self._extractor.run(full).items()})

  def take(self, found):
    """Features of some images, {name: (B, D)}."""
    for name, features in found.items():
      if name != 'logits' and len(features):
        self._moments.setdefault(name, frechet.Moments()).add(features)
      if name == 'pool' and self._kept is not None:
        inside = self._kept[(self._kept >= self._taken) & (self._kept < self._taken + len(features))]
        features = features[inside - self._taken]
      if name == 'pool' or name == 'logits' and self._kept is None:
        self._rows.setdefault(name, []).append(features)
    self._taken += len(found['pool'])

  def result(self):
    """`Gathered`; UserError for fewer than 2 images."""
    rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
    spatial = self._moments['spatial'].result() if 'spatial' in self._moments else None
    pool = self._moments['pool']
    return Gathered(pool.count, pool.result(), spatial, rows['pool'], rows.get('logits'))


def check_count(images):
  """UserError for an image set of fewer than 2 images."""
  if images.count < 2:
    raise UserError(f'{images.count} image(s) are too few to evaluate: give at least 2, better 10,000')


def gather(images, extractor, title='images'):
  """Reads an image set (see `image_sets`) once, batch by batch: `Gathered`. UserError for fewer than 2 images."""
  check_count(images)
  gathering = Gathering(extractor, images.count)
  with progress.bar(title=title, unit='image', total=images.count) as bar:
    for batch in images.batches(gathering.batch_size):
      gathering.add(batch)
      bar.update(len(batch))
  return gathering.result()


def gather_source(source, size, extractor, most, workers=0):
  """`Gathered` of all images of a data source, whole and fitted to a size; unreadable ones are left out.

  Each process decodes its share. most: see `Gathering`; workers: see `pipeline.eval_batches`.
  """
  gathering = Gathering(extractor, len(source), most)
  index, count = mesh_lib.process_part(extractor.mesh, gathering.batch_size)
  batches = pipeline.eval_batches(
      source, batch_size=gathering.batch_size, size=size, enlarge=1, workers=workers, process_index=index,
      process_count=count)
  show = processes.is_first()
  with contextlib.closing(batches), progress.bar(title='reference', unit='image', total=len(source), show=show) as bar:
    for batch in batches:
      gathering.take(extractor.run_share(batch))
      bar.update(gathering.batch_size)
  return gathering.result()


def read_statistics(path):
  """Gathered from an `.npz` of statistics (mu, sigma, perhaps mu_s, sigma_s and pool), or None when it holds none.

  UserError for statistics that are none: other shapes, NaN.
  """
  if pathlib.Path(path).suffix.lower() != '.npz' or not pathlib.Path(path).is_file():
    return None
  try:
    with np.load(path) as file:
      if not {'mu', 'sigma'} <= set(file.files):
        return None
      arrays = {name: file[name] for name in ('mu', 'sigma', 'mu_s', 'sigma_s', 'pool') if name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
    return None  # whoever opens it as images says what is wrong
  pool, spatial = _moments(arrays, '', path), _moments(arrays, '_s', path) if 'mu_s' in arrays else None
  return Gathered(0, pool, spatial, arrays.get('pool'))


def _moments(arrays, end, path):
  """(mean, covariance) of an `.npz`; UserError when they are none."""
  mu, sigma = arrays[f'mu{end}'], arrays.get(f'sigma{end}', np.empty(0))
  if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape) or not np.isfinite(mu.sum() + sigma.sum()):
    raise UserError(f'mu{end} {mu.shape} and sigma{end} {sigma.shape} in {path} are not a finite mean and covariance: '
                    'compute them again')
  return mu, sigma


def write_statistics(path, gathered):
  """Writes mu, sigma and, where there are spatial features, mu_s, sigma_s; and the pooled features as pool."""
  arrays = dict(zip(('mu', 'sigma'), gathered.pool)) | {'pool': gathered.pool_NxD}
  if gathered.spatial:
    arrays |= dict(zip(('mu_s', 'sigma_s'), gathered.spatial))
  whole.arrays(path, **arrays)


def note_few(count, what='samples'):
  """Says so where a FID is of fewer images than its features."""
  if count < FEW:
    note(f'FID of {count} {what}: below {FEW:,} it depends on their number, so compare it with figures of as many only')


def compare(samples, reference):
  """{name: number} of two `Gathered`: fid and, of the features at hand, sfid, inception_score, precision, recall."""
  figures = {'fid': frechet.frechet_distance(*reference.pool, *samples.pool)}
  if samples.spatial and reference.spatial:
    figures['sfid'] = frechet.frechet_distance(*reference.spatial, *samples.spatial)
  if samples.logits_NxC is not None:
    figures['inception_score'] = measures.inception_score(samples.logits_NxC)
  if reference.pool_NxD is not None:
    figures['precision'], figures['recall'] = measures.precision_recall(reference.pool_NxD, samples.pool_NxD)
  return figures
