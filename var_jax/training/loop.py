"""The one training loop. It never asks which stage it runs.

The order is an invariant: evaluate, save, take the next batch, step. Metrics of a step are fetched after the next one
has been dispatched, so that the device does not wait for Python.
"""

import math
import signal

import jax
import jax.numpy as jnp
import numpy as np

from var_jax import progress
from var_jax.data import pipeline
from var_jax.errors import UserError, note
from var_jax.training import mesh as mesh_lib
from var_jax.training import metrics as metrics_lib
from var_jax.training import processes


class Interrupted(Exception):
  """The run was asked to stop and has saved. `signal_number` says by which signal."""

  def __init__(self, signal_number, step):
    super().__init__(f'stopped at step {step} and saved; the same command goes on from there')
    self.signal_number = signal_number


def train(stage, config, source, validation, checkpoints, workdir, *, say=note, measure=None, keep=None):
  """Trains a stage to its last step, resuming from the newest checkpoint. Returns the final state.

  stage: init(), train_step(state, batch) -> (state, metrics), eval_step(state, batch) -> sums over images,
  summarize(sums) -> scalars, pictures(state, batch) -> {name: (H, W, 3) uint8}, metadata (stored with checkpoints).
  source, validation: see `data.sources`. measure: state -> scalars, called every `config.measure.every` steps.
  keep: called with (parameters, step) where `config.best` is better than ever before. Raises UserError after
  `max_skipped_in_row` steps without finite gradients, Interrupted after SIGTERM or Ctrl-C.
  """
  shapes = jax.eval_shape(stage.init, stage.initial)
  mesh = mesh_lib.suited(mesh_lib.make_mesh(**config.mesh), shapes)
  if processes.is_first() and (left := mesh_lib.undivided(shapes, mesh)):
    say(left)
  with jax.set_mesh(mesh), processes.stop_requests() as stop:
    state = _first_state(stage, checkpoints, mesh)
    start = int(state.step)
    if start:
      say(f'resuming from step {start} of {stage.steps}')
    elif metrics_lib.set_aside(workdir):
      say(f'no checkpoint in {workdir}: beginning at step 0; the metrics so far are now in metrics_before.jsonl')
    writer = metrics_lib.Writer(workdir, start)
    batches = pipeline.train_batches(source, start=start, **_data_options(config, stage, mesh))
    best = _Best(config.best, writer, keep)
    evaluate = _Evaluation(stage, config, validation, mesh, writer, measure, best)
    bar = progress.bar(title=stage.name, unit='step', total=stage.steps, initial=start, delay=0,
                       show=processes.is_first())
    try:
      state = _run(stage, config, state, batches, evaluate, checkpoints, mesh, writer, bar, stop)
      best.finish(say)
      return state
    finally:
      bar.close()
      batches.close()
      writer.close()
      if batches.skipped:
        say(f'{batches.skipped} of {batches.drawn} images drawn could not be read; their neighbours took their places')


def _first_state(stage, checkpoints, mesh):
  """The newest checkpoint's state, or a new one, laid out over the mesh: no device ever holds more than its part."""
  shapes = mesh_lib.placed(jax.eval_shape(stage.init, stage.initial), mesh)
  restored = checkpoints.restore(shapes)
  places = jax.tree.map(lambda x: x.sharding, shapes)
  state = restored[0] if restored else jax.jit(stage.init, out_shardings=places)(stage.initial)
  return state.replace(frozen=mesh_lib.put_state(stage.frozen, mesh))


def _data_options(config, stage, mesh):
  data, (index, count) = config.data, mesh_lib.process_part(mesh, config.batch_size)
  return dict(
      batch_size=config.batch_size, size=stage.image_size, seed=config.seed, enlarge=data.enlarge, flip=data.flip,
      workers=data.workers, process_index=index, process_count=count)


def jitted_step(stage, state, mesh):
  """The jitted train_step: (state, batch, a number of each device, phase=None) -> (state, metrics).

  phase: static, a program each, see `stage.phase` where a stage has it. state: to take the shardings from. The metrics
  also tell whether any process was asked to stop, the same on all.
  """

  def step(state, batch, stop, phase=None):
    state, metrics = stage.train_step(state, batch, **({} if phase is None else {'phase': phase}))
    return state, metrics | {'stop': jnp.max(stop)}

  places = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, static_argnames='phase', out_shardings=(places, mesh_lib.replicated(mesh)))


def _run(stage, config, state, batches, evaluate, checkpoints, mesh, writer, bar, stop):
  train_step, several = jitted_step(stage, state, mesh), jax.process_count() > 1
  phase = getattr(stage, 'phase', lambda step: None)
  mean, pending, start = metrics_lib.Mean(), None, int(state.step)
  step, asked = start, None if several else stop  # several processes stop together, after the step that told them all

  def fetch():
    """Takes in the metrics of the step before the one under way."""
    nonlocal asked
    if pending is None:
      return
    mean.add({name: value for name, value in pending.items() if name != 'stop'})
    if several and (number := int(pending['stop'])):
      asked = [number]
    if int(pending['skipped_in_row']) >= config.max_skipped_in_row:
      checkpoints.finish()
      raise UserError(
          f'{config.max_skipped_in_row} steps in a row up to step {step} had gradients that are not finite: lower '
          f'optimizer.peak_lr or use float32; the last checkpoint is step {(checkpoints.steps() or [0])[-1]}')

  while True:
    last = step >= stage.steps
    due = lambda every: step > start and every > 0 and (step % every == 0 or last)
    if due(config.log_every) or last and pending is not None:
      fetch()
      pending = None
      scalars = mean.take()
      scalars['images_per_second'] = scalars['steps_per_second'] * config.batch_size
      writer.scalars(step, {f'train/{name}': value for name, value in scalars.items()})
    evaluate.at(state, step, due)
    if due(config.checkpoint_every) or last or asked:
      checkpoints.save(state, stage.metadata)
    if asked or last:
      checkpoints.finish()
    if asked and not last:
      raise Interrupted(asked[0], step)
    if last:
      return state
    batch = mesh_lib.put_batch(next(batches), mesh)
    state, metrics = train_step(state, batch, mesh_lib.put_number(stop[0] if stop else 0, mesh), phase=phase(step))
    if several and not asked and processes.preempted(step + 1):
      asked = [signal.SIGTERM]
    fetch()
    if pending is not None and not bar.disable:
      rate = (step - start) * config.batch_size / bar.format_dict['elapsed']
      bar.set_postfix_str(f'loss {float(pending["loss"]):.4f}, {rate:.0f} images/s', refresh=False)
    pending, step = metrics, step + 1
    bar.update()


class _Best:
  """Watches one scalar, lower being better, or higher with '-' before its name; '' watches nothing."""

  def __init__(self, name, writer, keep):
    self._name, self._sign = name.removeprefix('-'), -1 if name.startswith('-') else 1
    self._writer, self._keep = writer, keep
    values = writer.history(self._name) if name else []
    self._lowest = processes.from_first(min((self._sign * value for value in values), default=math.inf))

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


class _Evaluation:
  """Scalars and pictures on held-out images, figures of samples, the best model. The batches are always the same."""

  def __init__(self, stage, config, source, mesh, writer, measure, best):
    self.stage, self.config, self.source, self.mesh = stage, config, source, mesh
    self.writer, self._measure, self._best = writer, measure, best
    self._step = jax.jit(stage.eval_step, out_shardings=mesh_lib.replicated(mesh))

  def at(self, state, step, due):
    """All that is due at a step. due: setting -> whether."""
    if due(self.config.eval_every):
      self.scalars(state, step)
    if due(self.config.pictures_every):
      self.pictures(state, step)
    if self._measure and due(self.config.measure.every):
      figures = self._measure(state)
      self.writer.scalars(step, {f'samples/{name}': value for name, value in figures.items()})
    self._best.check(state, step)

  def _batches(self, limit):
    options = _data_options(self.config, self.stage, self.mesh)
    for name in ('seed', 'flip'):
      options.pop(name)
    return pipeline.eval_batches(self.source, limit=limit, **options)

  def scalars(self, state, step):
    sums = None
    for batch in self._batches(self.config.eval_images or None):
      new = jax.tree.map(np.asarray, self._step(state, mesh_lib.put_batch(batch, self.mesh)))
      sums = new if sums is None else jax.tree.map(np.add, sums, new)
    scalars = self.stage.summarize(sums)
    self.writer.scalars(step, {f'validation/{name}': value for name, value in scalars.items()})

  def pictures(self, state, step):
    batch = next(iter(self._batches(self.config.batch_size)))
    for name, picture in self.stage.pictures(state, mesh_lib.put_batch(batch, self.mesh)).items():
      self.writer.picture(step, name, picture)
