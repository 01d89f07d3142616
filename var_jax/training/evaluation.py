"""What a run does beside its steps: scalars and pictures on held-out images, figures of samples, the best model."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from var_jax import progress
from var_jax.data import pipeline
from var_jax.errors import note
from var_jax.training import mesh as mesh_lib
from var_jax.training import processes

PICTURES = 8  # held-out images that a stage's pictures show, spread over the classes


def data_options(config, stage, mesh):
  """The arguments of `pipeline.train_batches` that a run's config says."""
  data, (index, count) = config.data, mesh_lib.process_part(mesh, config.batch_size)
  return dict(
      batch_size=config.batch_size, size=stage.image_size, seed=config.seed, enlarge=data.enlarge, flip=data.flip,
      workers=data.workers, threads=data.threads, process_index=index, process_count=count)


class Evaluation:
  """What is due beside the steps, each part once a step. The held-out batches are always the same.

  A part is done once its result is written: a run that was ended within an evaluation goes on with what is left of it.
  unreadable: the `Unreadable` of the run; start: the step that it begins with; stop: receives the numbers of signals,
  see `processes.stop_requests`.
  """

  TELLING = {'scalars': 'evaluating', 'pictures': 'drawing pictures', 'figures': 'measuring samples'}

  def __init__(self, stage, config, source, unreadable, mesh, writer, measure, best, stop, start):
    self._stage, self._config, self._source, self._mesh = stage, config, source, mesh
    self._unreadable = unreadable
    self._writer, self._measure, self._best, self._stop = writer, measure, best, stop
    step = lambda state, batch, stop: (stage.eval_step(state, batch), jnp.max(stop))
    self._step = jax.jit(step, out_shardings=mesh_lib.replicated(mesh))
    self._drawn_at = start if writer.has_pictures(start) else None

  def due(self, step, due):
    """Names of the parts that are due at a step and not done. due: setting -> whether."""
    config, writer = self._config, self._writer
    parts = {
        'scalars': due(config.eval_every) and not writer.has_scalars('validation/', step),
        'pictures': due(config.pictures_every) and self._drawn_at != step,
        'figures': self._measure and due(config.measure.every) and not writer.has_scalars('samples/', step)}
    return [part for part, is_due in parts.items() if is_due]

  def run(self, state, step, parts, bar):
    """Does some parts, then keeps the model if it is the best. Returns [the signal that asked to stop before] or [].

    A signal is heeded between the parts and between the batches of one, which then leaves nothing.
    """
    for part in parts:
      with bar.doing(self.TELLING[part]):
        asked = getattr(self, f'_{part}')(state, step) or processes.asked(self._stop)
      if asked:
        return [asked]
    self._best.check(state, step)
    return []

  def _batches(self, limit):
    options = data_options(self._config, self._stage, self._mesh)
    for name in ('seed', 'flip'):
      options.pop(name)
    return contextlib.closing(pipeline.eval_batches(
        self._source, limit=limit, unreadable=self._unreadable, **options))

  def _scalars(self, state, step):
    images, size, sums = self._config.eval_images or len(self._source), self._config.batch_size, None
    total = -(-min(images, len(self._source)) // size)
    with self._batches(images) as batches, progress.bar(
        title='evaluating', unit='batch', total=total, show=processes.is_first()) as bar:
      for batch in batches:
        number = mesh_lib.put_number(self._stop[0] if self._stop else 0, self._mesh)
        new, asked = jax.tree.map(np.asarray, self._step(state, mesh_lib.put_batch(batch, self._mesh), number))
        if asked:
          return int(asked)
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
        bar.update()
    if not sums['images']:
      note(f'none of the held-out images can be read, so step {step} has no figures of them')
      return
    scalars = self._stage.summarize(sums)
    self._writer.scalars(step, {f'validation/{name}': value for name, value in scalars.items()})

  def _pictures(self, state, step):
    with self._batches(min(PICTURES, self._config.batch_size)) as batches:
      batch = mesh_lib.put_batch(next(batches), self._mesh)
    for name, picture in self._stage.pictures(state, batch).items():
      self._writer.picture(step, name, picture)
    self._drawn_at = step

  def _figures(self, state, step):
    figures = self._measure(state)
    self._writer.scalars(step, {f'samples/{name}': value for name, value in figures.items()})


class Best:
  """Watches one scalar, lower being better, or higher with '-' before its name; '' watches nothing.

  start: the step that the run begins with, whose model is kept now where that was left undone.
  """

  def __init__(self, name, writer, keep, start):
    self._name, self._sign = name.removeprefix('-'), -1 if name.startswith('-') else 1
    self._writer, self._keep = writer, keep
    earlier = [value for step, value in writer.history(self._name) if step < start] if name else []
    self._lowest = min((self._sign * value for value in earlier), default=math.inf)

  def check(self, state, step):
    """Keeps the model if the scalar was measured at this step and is better than ever."""
    value = self._writer.at(self._name, step) if self._name else None
    if value is not None and self._sign * value < self._lowest:
      self._lowest = self._sign * value
      self._keep(state.model, step)

  def finish(self, say):
    """Says so when the scalar was never measured."""
    if self._name and self._lowest == math.inf:
      say(f'best={self._name!r} was never measured, so no best model was kept: see the names in metrics.jsonl')
