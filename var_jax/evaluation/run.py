"""One evaluation from beginning to end: what is evaluated, against what, by which features."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from var_jax import workdir as workdir_lib
from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.evaluation import classes, fid, likelihood, reconstruction
from var_jax.evaluation.drawing import draw
from var_jax.evaluation.image_sets import NpzImages, SourceImages, open_images
from var_jax.model import load
from var_jax.tokenizer import lpips

KEPT_ROWS = 10_000  # of a data set's features, for precision and recall


class Request(NamedTuple):
  """What `var-jax evaluate` was asked for. inception: by its features, else by a classifier's.

  workdir, samples, reference, weights: paths or None; choices: keyword arguments of `Model.sample`.
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


def figures_of(request):
  """{name: number or text}. Raises UserError for what cannot be compared."""
  config = workdir_lib.read_config(request.workdir) if request.workdir else None
  samples = open_images(request.samples) if request.samples else None
  if samples is None and config.stage == 'tokenizer':
    return _of_tokenizer(request, config)
  if request.inception and request.reference:
    _check_sizes(samples, request)
  found, path = {}, request.samples
  if samples is None:
    found, path = _drawn(request, config)
    samples = open_images(path)
  return found | (_by_inception if request.inception else _by_classifier)(request, config, samples, path)


def _of_tokenizer(request, config):
  extractor = fid.inception_extractor(request.weights, request.resize) if request.inception else None
  params = lpips.load(*request.lpips_weights) if request.lpips_weights else None
  return reconstruction.figures(
      load(request.workdir), config, batch_size=request.batch_size, extractor=extractor, lpips_params=params)


def _drawn(request, config):
  """(the generator's own figures, the .npz that its samples are in)."""
  model = load(request.workdir)
  labels = np.repeat(np.arange(model.generator.classes), request.per_class)
  path = pathlib.Path(request.workdir) / 'evaluation_samples.npz'
  draw(model, labels, request.seed, path, request.choices, request.batch_size)
  return likelihood.figures(model, config, request.batch_size) | request.choices | {'seed': request.seed}, path


def _by_classifier(request, config, samples, path):
  real = classes.RealImages(config, samples.size)
  judge = classes.find_judge(real, request.workdir)
  images = np.concatenate(list(samples.batches(1024)))
  return classes.figures(judge, real, images, _labels(path, len(images)))


def _labels(path, count):
  """(N,) labels beside the images of an .npz, None where there are none."""
  if not pathlib.Path(path).is_file():
    return None
  with np.load(path) as arrays:
    labels = arrays['labels'] if 'labels' in arrays.files else None
  return labels if labels is not None and labels.shape == (count,) else None


def _by_inception(request, config, samples, path):
  extractor = fid.inception_extractor(request.weights, request.resize)
  if request.reference:
    reference = _reference(request.reference, extractor)
  else:
    reference = _own_reference(request, config, samples.size, extractor)
  figures = fid.compare(fid.gather(samples, extractor, 'samples'), reference)
  return {'samples': samples.count, 'resize': request.resize} | figures


def _check_sizes(samples, request):
  """UserError when the sets are too small or of different sizes, before anything is computed."""
  if samples:
    fid.check_count(samples)
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


def _own_reference(request, config, size, extractor):
  """Gathered of the training images of a workdir's data, kept in the workdir."""
  weights = pathlib.Path(request.weights).stat()
  key = [config.data.source, config.data.path, list(size), request.resize, weights.st_size, weights.st_mtime_ns]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  path = pathlib.Path(request.workdir) / f'reference_{name}.npz'
  if (kept := fid.read_statistics(path)) is not None:
    return kept
  source = open_source(config.data.source, config.data.path, 'train')
  reference = fid.gather(SourceImages(source, size), extractor, 'reference')
  rows = np.linspace(0, reference.count - 1, min(reference.count, KEPT_ROWS)).astype(int)
  reference = reference._replace(pool_NxD=reference.pool_NxD[rows])
  fid.write_statistics(path, reference)
  return reference
