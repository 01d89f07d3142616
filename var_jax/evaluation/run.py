"""One evaluation from beginning to end: what is evaluated, against what, by which features."""

import hashlib
import itertools
import json
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from var_jax import workdir as workdir_lib
from var_jax.data.sources import identity, moved, open_source
from var_jax.errors import UserError, note
from var_jax.evaluation import classes, fid, grid, inception, likelihood, reconstruction, report
from var_jax.evaluation.drawing import draw
from var_jax.evaluation.image_sets import NpzImages, open_images
from var_jax.model import load
from var_jax.tokenizer import lpips
from var_jax.training import processes

KEPT_ROWS = 10_000  # of a data set's features, for precision and recall
REFERENCES = 2  # counts up when the code gives a data set other statistics


class Request(NamedTuple):
  """What `var-jax evaluate` was asked for. inception: by its features, else by a classifier's.

  workdir, samples, reference, weights: paths or None; folder: where samples, judge, statistics and the report are kept;
  data: the images' place where it is not the config's, see `sources.moved`; choices: keyword arguments of
  `Model.sample`; grid: points of them to compare, see `grid.parse`.
  """

  workdir: str | None
  samples: str | None
  reference: str | None
  folder: str
  data: str | None
  inception: bool
  weights: str | None
  resize: str
  lpips_weights: tuple
  per_class: int
  seed: int
  batch_size: int
  choices: dict
  grid: tuple = ()


def figures_of(request, done=lambda figures: None):
  """{name: number or text}. Raises UserError for what cannot be compared.

  With a grid: {'figure': the name that points are compared by, 'best': row, 'grid': rows}. A workdir's model gets a
  `report.html`. done: called with the figures before that, so that they are safe whatever happens to the report.
  """
  config = workdir_lib.read_config(request.workdir) if request.workdir else None
  if request.data:
    config = moved(config, request.data)
  samples = open_images(request.samples) if request.samples else None
  if samples is not None:
    fid.check_count(samples)
  _check_sizes(samples, request)
  if samples is not None:
    labels = _labels(request.samples, samples.count)
    figures = _comparison(request, config, samples.size)(samples, labels)
    done(figures)
    return figures
  model = load(request.workdir)
  if config.stage == 'tokenizer':
    figures, drawn = _of_tokenizer(request, config, model), None
  else:
    compare = _comparison(request, config, model.tokenizer.image_size)
    if request.grid:
      rows = [point | _of_drawn(request, model, compare, request.choices | point)[0] for point in request.grid]
      figures = {'figure': grid.figure_of(rows), 'best': grid.best(rows), 'grid': rows}
      done(figures)
      return figures
    figures, drawn = _of_drawn(request, model, compare, request.choices)
    if request.reference and not _has_data(config):  # a converted model may be evaluated without its data set
      done(figures)
      return figures
    try:
      figures = likelihood.figures(model, config, request.batch_size) | figures
    except UserError as error:
      note(f'no loss on held-out images: {error}')
  done(figures)
  try:
    path = report.write(request.folder, request.workdir, model, config, figures, drawn)
  except (UserError, OSError) as error:
    note(f'no report: {error}')
  else:
    if processes.is_first():
      note(f'report: {path}')
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
  path = pathlib.Path(request.folder) / 'evaluation_samples.npz'
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
    judge = classes.find_judge(real, request.folder)
    return lambda images, labels: classes.figures(
        judge, real, np.concatenate(list(images.batches(1024))), labels, by_name=not request.grid)
  extractor = fid.inception_extractor(request.weights, request.resize)
  if request.reference:
    reference = reference_of(request.reference, extractor)
  else:
    reference = own_reference(request.folder, config, size, extractor, request.weights, request.resize)

  def compare(images, labels):
    del labels
    fid.note_few(images.count)
    return {'samples': images.count, 'resize': request.resize} | fid.compare(
        fid.gather(images, extractor, 'samples'), reference)

  return compare


def _labels(path, count):
  """(N,) labels beside the images of an .npz, None where there are none."""
  if not pathlib.Path(path).is_file():
    return None
  try:
    with np.load(path) as arrays:
      labels = arrays['labels'] if 'labels' in arrays.files else None
  except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'cannot read the labels in {path} ({error}): write the file again') from error
  if labels is None:
    return None
  if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(f'{path} has {count} images, its labels are {labels.dtype} {labels.shape}: give each image one '
                    'whole number, or leave labels out')
  return labels


def _check_sizes(samples, request):
  """UserError when what is compared is too few or not of one size, before anything is computed."""
  sizes = {}
  if samples:
    sizes[request.samples] = samples.size
  if request.reference and not fid.read_statistics(request.reference):
    reference = open_images(request.reference)
    fid.check_count(reference)
    sizes[request.reference] = reference.size
  if not (samples and request.reference):  # the model's own size: its samples have it, and its data is fitted to it
    sizes[request.workdir] = workdir_lib.image_size(request.workdir)
  (first, (height, width)), *others = sizes.items()
  for other, size in others:
    if tuple(size) != (height, width):
      raise UserError(f'{first} has images of {height}x{width} pixels, {other} of {size[0]}x{size[1]}: compare images '
                      'of one size')


def reference_of(path, extractor):
  """Gathered of an .npz of statistics, of images or of both, or of a folder."""
  statistics = fid.read_statistics(path)
  if statistics and statistics.pool[0].shape != (inception.FEATURES,):
    raise UserError(f'{path} has statistics of {len(statistics.pool[0])} features, the FID Inception gives '
                    f'{inception.FEATURES}: compute them with the same network')
  if statistics is None:
    return fid.gather(open_images(path), extractor, 'reference')
  try:
    images = NpzImages(path)
  except UserError:
    return statistics
  return statistics._replace(pool_NxD=fid.gather(images, extractor, 'reference').pool_NxD)


def own_reference(folder, config, size, extractor, weights, resize):
  """Gathered of the training images of a config's data, kept in a folder. weights, resize: the extractor's."""
  source = open_source(config.data.source, config.data.path, 'train')
  with open(weights, 'rb') as file:
    network = hashlib.file_digest(file, 'sha256').hexdigest()
  data = processes.from_first(identity(source) if processes.is_first() else None)  # it reads of every image
  key = [REFERENCES, data, list(size), resize, network]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  path = pathlib.Path(folder) / f'reference_{name}.npz'
  if (kept := fid.read_statistics(path)) is not None:
    return kept
  reference = fid.gather_source(source, size, extractor, KEPT_ROWS, config.data.workers)
  if processes.is_first():
    fid.write_statistics(path, reference)
  return reference
