"""One evaluation from beginning to end: what is evaluated, against what, by which features."""

import hashlib
import itertools
import json
import pathlib
from typing import NamedTuple

import numpy as np

from var_jax import workdir as workdir_lib
from var_jax.data.sources import open_source
from var_jax.errors import UserError, note
from var_jax.evaluation import classes, fid, grid, likelihood, reconstruction, report
from var_jax.evaluation.drawing import draw
from var_jax.evaluation.image_sets import NpzImages, SourceImages, open_images
from var_jax.model import load
from var_jax.tokenizer import lpips

KEPT_ROWS = 10_000  # of a data set's features, for precision and recall


class Request(NamedTuple):
  """What `var-jax evaluate` was asked for. inception: by its features, else by a classifier's.

  workdir, samples, reference, weights: paths or None; choices: keyword arguments of `Model.sample`; grid: points of
  them to compare, see `grid.parse`.
  """

  workdir: str | None
  samples: str | None
  reference: str | None
  inception: bool
  weights: str | None
  resize: str
  lpips_weights: tuple
  per_class: int
  seed: int
  batch_size: int
  choices: dict
  grid: tuple = ()


def figures_of(request):
  """{name: number or text}. Raises UserError for what cannot be compared.

  With a grid: {'figure': the name that points are compared by, 'best': row, 'grid': rows}. A workdir's model gets a
  `report.html` in it.
  """
  config = workdir_lib.read_config(request.workdir) if request.workdir else None
  samples = open_images(request.samples) if request.samples else None
  if samples is not None:
    fid.check_count(samples)
  if request.inception and request.reference:
    _check_sizes(samples, request)
  if samples is not None:
    return _comparison(request, config, samples.size)(samples, _labels(request.samples, samples.count))
  model = load(request.workdir)
  if request.grid and config.stage == 'tokenizer':
    raise UserError(f'{request.workdir} holds a tokenizer, which draws nothing: give a generator for --grid')
  if config.stage == 'tokenizer':
    figures, drawn = _of_tokenizer(request, config, model), None
  else:
    compare = _comparison(request, config, model.tokenizer.image_size)
    if request.grid:
      rows = [point | _of_drawn(request, model, compare, request.choices | point)[0] for point in request.grid]
      return {'figure': grid.figure_of(rows), 'best': grid.best(rows), 'grid': rows}
    figures, drawn = _of_drawn(request, model, compare, request.choices)
    if request.reference and not _has_data(config):  # a converted model may be evaluated without its data set
      return figures
    figures = likelihood.figures(model, config, request.batch_size) | figures
  report.write(request.workdir, model, config, figures, drawn)
  return figures


def _has_data(config):
  try:
    open_source(config.data.source, config.data.path, 'validation')
  except UserError as error:
    note(f'no loss and no report, for there are no held-out images: {error}')
    return False
  return True


def _of_tokenizer(request, config, model):
  extractor = fid.inception_extractor(request.weights, request.resize) if request.inception else None
  params = lpips.load(*request.lpips_weights) if request.lpips_weights else None
  return reconstruction.figures(
      model, config, batch_size=request.batch_size, extractor=extractor, lpips_params=params)


def _of_drawn(request, model, compare, choices):
  """(figures of samples that the generator draws, the first images of each class with their labels)."""
  labels = np.repeat(np.arange(model.generator.classes), request.per_class)
  path = pathlib.Path(request.workdir) / 'evaluation_samples.npz'
  draw(model, labels, request.seed, path, choices, request.batch_size)
  images = open_images(path)
  shown = labels[:report.MOST_CLASSES * request.per_class]
  batches = itertools.islice(images.batches(request.batch_size), -(-len(shown) // request.batch_size))
  first = np.concatenate(list(batches))[:len(shown)]
  return compare(images, labels) | choices | {'seed': request.seed}, (first, shown)


def _comparison(request, config, size):
  """A function of (image set, labels or None) -> figures against the reference, which is read once."""
  if not request.inception:
    real = classes.RealImages(config, size)
    judge = classes.find_judge(real, request.workdir)
    return lambda images, labels: classes.figures(judge, real, np.concatenate(list(images.batches(1024))), labels)
  extractor = fid.inception_extractor(request.weights, request.resize)
  if request.reference:
    reference = _reference(request.reference, extractor)
  else:
    reference = own_reference(request.workdir, config, size, extractor, request.weights, request.resize)
  return lambda images, labels: {'samples': images.count, 'resize': request.resize} | fid.compare(
      fid.gather(images, extractor, 'samples'), reference)


def _labels(path, count):
  """(N,) labels beside the images of an .npz, None where there are none."""
  if not pathlib.Path(path).is_file():
    return None
  with np.load(path) as arrays:
    labels = arrays['labels'] if 'labels' in arrays.files else None
  return labels if labels is not None and labels.shape == (count,) else None


def _check_sizes(samples, request):
  """UserError when the reference is too small or of another size, before anything is computed."""
  if fid.read_statistics(request.reference):
    return
  reference = open_images(request.reference)
  fid.check_count(reference)
  if samples and reference.size != samples.size:
    raise UserError(f'{request.samples} has images of {samples.size[0]}x{samples.size[1]} pixels, {request.reference} '
                    f'of {reference.size[0]}x{reference.size[1]}: compare images of one size')


def _reference(path, extractor):
  """Gathered of an .npz of statistics, of images or of both, or of a folder."""
  statistics = fid.read_statistics(path)
  if statistics is None:
    return fid.gather(open_images(path), extractor, 'reference')
  try:
    images = NpzImages(path)
  except UserError:
    return statistics
  return statistics._replace(pool_NxD=fid.gather(images, extractor, 'reference').pool_NxD)


def own_reference(workdir, config, size, extractor, weights, resize):
  """Gathered of the training images of a workdir's data, kept in the workdir. weights, resize: the extractor's."""
  file = pathlib.Path(weights).stat()
  key = [config.data.source, config.data.path, list(size), resize, file.st_size, file.st_mtime_ns]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  path = pathlib.Path(workdir) / f'reference_{name}.npz'
  if (kept := fid.read_statistics(path)) is not None:
    return kept
  source = open_source(config.data.source, config.data.path, 'train')
  reference = fid.gather(SourceImages(source, size), extractor, 'reference')
  rows = np.linspace(0, reference.count - 1, min(reference.count, KEPT_ROWS)).astype(int)
  reference = reference._replace(pool_NxD=reference.pool_NxD[rows])
  fid.write_statistics(path, reference)
  return reference
