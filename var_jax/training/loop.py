"""The one training loop. It never asks which stage it runs.

The order is an invariant: save, evaluate, take the next batch, step. So an evaluation that fails costs no steps, and
what is due at a step and not done is done first by the run that resumes there. Metrics of a step are fetched after the
next one has been dispatched, so that the device does not wait for Python.
"""

import contextlib
import functools
import signal

import jax
import jax.numpy as jnp

from var_jax import axes, progress, signals
from var_jax.data import pipeline
from var_jax.data.unreadable import Unreadable
from var_jax.errors import UserError, note
from var_jax.training import mesh as mesh_lib
from var_jax.training import metrics as metrics_lib
from var_jax.training import processes
from var_jax.training.evaluation import Best, Evaluation, data_options


def _saved(step):
  return f'stopped at step {step} and saved; the same command goes on from there'


class Interrupted(Exception):
  """The run was asked to stop and has saved. `signal_number` says by which signal."""

  def __init__(self, signal_number, step):
    super().__init__(_saved(step))
    self.signal_number = signal_number


def train(stage, config, source, validation, checkpoints, workdir, *, say=note, measure=None, keep=None):
  """Trains a stage to its last step, resuming from the newest checkpoint. Returns the final state.

  stage: init(), train_step(state, batch) -> (state, metrics), eval_step(state, batch) -> sums over images,
  phase(step) -> which program the step needs, a static argument of train_step; summarize(sums) -> scalars,
  pictures(state, batch) -> {name: (H, W, 3) uint8}, metadata (stored with checkpoints).
  source, validation: see `data.sources`. measure: state -> scalars, called every `config.measure.every` steps.
  keep: called with (parameters, step) where `config.best` is better than ever before. Raises UserError after
  `max_skipped_in_row` steps without finite gradients, Interrupted after one of `signals.NUMBERS`.
  """
  shapes = jax.eval_shape(stage.init, stage.initial)
  mesh = _mesh(shapes, config, say)
  with jax.set_mesh(mesh):
    state = _first_state(stage, shapes, checkpoints, mesh)  # what stops that loses nothing
    with processes.stop_requests() as stop:
      start = int(state.step)
      if start:
        say(f'resuming from step {start} of {stage.steps}')
      elif metrics_lib.set_aside(workdir):
        say(f'no checkpoint in {workdir}: beginning at step 0; the metrics so far are now in metrics_before.jsonl')
      writer = metrics_lib.Writer(workdir, start)
      unreadable = Unreadable()
      batches = pipeline.train_batches(
          source, start=start, unreadable=unreadable, **data_options(config, stage, mesh))
      best = Best(config.best, writer, keep, start)
      evaluation = Evaluation(stage, config, validation, unreadable, mesh, writer, measure, best, stop, start)
      bar = progress.bar(title=stage.name, unit='step', total=stage.steps, initial=start, delay=0,
                         show=processes.is_first())
      try:
        steps = _Steps(stage, config, state, mesh, stop, checkpoints)
        state = _run(stage, config, state, steps, batches, evaluation, checkpoints, writer, bar)
        best.finish(say)
        return state
      finally:
        bar.close()
        batches.close()
        writer.close()
        if batches.skipped:
          say(f'{batches.skipped} of {source.total} images could not be read; the first: {unreadable.first}. In '
              'training their neighbours took their places')


def _mesh(shapes, config, say):
  """The mesh of a run. Says what of a state of these shapes stays whole on each device."""
  mesh = mesh_lib.suited(mesh_lib.make_mesh(**config.mesh), shapes)
  if processes.is_first() and (left := mesh_lib.undivided(shapes, mesh)):
    say(left)
  return mesh


def _first_state(stage, shapes, checkpoints, mesh):
  """The newest checkpoint's state, or a new one, laid out over the mesh: no device ever holds more than its part."""
  shapes = mesh_lib.placed(shapes, mesh)
  restored = checkpoints.restore(shapes)
  places = jax.tree.map(lambda x: x.sharding, shapes)
  # It runs once: on a CPU optimizing it takes longer than the first hundred steps of a small model.
  options = {'xla_backend_optimization_level': 0} if axes.platform() == 'cpu' else None
  init = jax.jit(stage.init, out_shardings=places, compiler_options=options)
  state = restored[0] if restored else init(stage.initial)
  return state.replace(frozen=mesh_lib.put_state(stage.frozen, mesh))


def jitted_step(stage, state, mesh):
  """The jitted train_step: (state, batch, a number of each device, phase=None) -> (state, metrics).

  phase: static, a program each, see `stage.phase`. state: to take the shardings from. The metrics
  also tell whether any process was asked to stop, the same on all.
  """

  def step(state, batch, stop, phase=None):
    state, metrics = stage.train_step(state, batch, phase)
    return state, metrics | {'stop': jnp.max(stop)}

  places = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, static_argnames='phase', out_shardings=(places, mesh_lib.replicated(mesh)))


class _Steps:
  """Dispatches steps, and fetches the metrics of each once the next is dispatched, or when `fetch` is called.

  asked: the signals that asked to stop; several processes stop together, after the step that told them all. mean: of
  the metrics fetched. last: those of the step fetched last, None at first. ready: the program of the phase that the run
  is in, None at first.
  """

  def __init__(self, stage, config, state, mesh, stop, checkpoints):
    self._step, self._config, self._mesh, self._stop = jitted_step(stage, state, mesh), config, mesh, stop
    self._phase_of, self._phase = stage.phase, None
    self._checkpoints, self._several, self._pending = checkpoints, jax.process_count() > 1, None
    self.asked, self.mean, self.last, self.ready = [] if self._several else stop, metrics_lib.Mean(), None, None

  def first_batch(self, state, step, batches, bar):
    """The first batch, once the program for it is compiled: its time is nobody's rate, and a signal ends it at once."""
    free = signals.at_once(_saved(step) if step else 'stopped before the first step')
    with contextlib.nullcontext() if self._several else free, bar.doing('compiling the first step', 0):
      with self.mean.paused():
        batch = next(batches)
        self._compile(state, step, self._put(batch))
    return batch

  def _compile(self, state, step, arguments):
    self._phase = self._phase_of(step)
    if jax.config.jax_disable_jit or jax.config.jax_debug_nans or jax.config.jax_debug_infs:
      self.ready = functools.partial(self._step, phase=self._phase)
    else:
      self.ready = self._step.lower(state, *arguments, phase=self._phase).compile()

  def take(self, state, step, batch):
    """The state after a step more."""
    arguments = self._put(batch)
    if self._phase_of(step) != self._phase:
      with self.mean.paused():
        self._compile(state, step, arguments)
    state, metrics = self.ready(state, *arguments)
    if self._several and not self.asked and processes.preempted(step + 1):
      self.asked.append(signal.SIGTERM)
    self.fetch(step)
    self._pending = metrics
    return state

  def fetch(self, step):
    """Takes in the metrics of the step before `step`, if that is to be done. UserError when too many were skipped."""
    if self._pending is None:
      return
    self.last, self._pending = self._pending, None
    self.mean.add({name: value for name, value in self.last.items() if name != 'stop'})
    if self._several and (number := int(self.last['stop'])):
      self.asked.append(number)
    most = self._config.max_skipped_in_row
    if int(self.last['skipped_in_row']) >= most:
      self._checkpoints.finish()
      raise UserError(
          f'{most} steps in a row up to step {step} had gradients that are not finite: lower optimizer.peak_lr or use '
          f'float32, in another --workdir; the last checkpoint is step {(self._checkpoints.steps() or [0])[-1]}')

  def _put(self, batch):
    number = self._stop[0] if self._stop else 0
    return mesh_lib.put_batch(batch, self._mesh), mesh_lib.put_number(number, self._mesh)


def _run(stage, config, state, steps, batches, evaluation, checkpoints, writer, bar):
  step = start = int(state.step)
  while True:
    last = step >= stage.steps
    due = lambda every: step > 0 and every > 0 and (step % every == 0 or last)
    if step > start and (due(config.log_every) or last):
      steps.fetch(step)
      checkpoints.guard()
      scalars = steps.mean.take()
      scalars['images_per_second'] = scalars['steps_per_second'] * config.batch_size
      writer.scalars(step, {f'train/{name}': value for name, value in scalars.items()})
    parts = evaluation.due(step, due)
    saved = step == start > 0
    if step > start and due(config.checkpoint_every) or last:
      checkpoints.save(state, stage.metadata)
      saved = True
    if saved and parts or last:
      checkpoints.finish()
    asked = steps.asked[:1]
    if not asked:
      with steps.mean.paused(), _nothing_lost(checkpoints, state, step, stage.metadata, saved and parts):
        asked = evaluation.run(state, step, parts, bar)
    if asked and (not last or evaluation.due(step, due)):
      checkpoints.save(state, stage.metadata)
      checkpoints.finish()
      raise Interrupted(asked[0], step)
    if last:
      return state
    batch = next(batches) if steps.ready else steps.first_batch(state, step, batches, bar)
    state, step = steps.take(state, step, batch), step + 1
    if steps.last and not bar.disable:
      rate = (step - 1 - start) * config.batch_size / max(bar.format_dict['elapsed'], 1e-9)
      bar.set_postfix_str(f'loss {float(steps.last["loss"]):.4f}, {rate:.0f} images/s', refresh=False)
    bar.update()


@contextlib.contextmanager
def _nothing_lost(checkpoints, state, step, metadata, saved):
  """Within, an evaluation may fail, and the state is saved then. A signal ends it at once where all is saved before.

  But several processes cannot save together when one of them fails: they lose what is not saved.
  """
  alone = jax.process_count() == 1
  free = signals.at_once(_saved(step))
  try:
    with free if saved and alone else contextlib.nullcontext():
      yield
  except Exception:
    if alone:
      checkpoints.save(state, metadata)
      checkpoints.finish()
      note(f'the evaluation of step {step} failed; the state is saved, and the same command begins with what is left')
    raise
