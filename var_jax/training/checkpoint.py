"""Checkpoints: `WORKDIR/checkpoints/STEP`, each with `model` (what inference needs) and `training` (all the rest).

The only file that speaks to orbax. A checkpoint appears under its final name once it is complete; the data's position
is the step itself, since batch n depends on the seed and n alone.
"""

import contextlib
import gc
import logging
import pathlib
import warnings

import jax
from orbax.checkpoint import v1 as ocp

from var_jax.errors import UserError, note


def _parts(state):
  """The state as (model, rest): the model's parameters are stored once, where inference finds them."""
  rest = state.replace(ema=None) if state.ema is not None else state.replace(params=None)
  return state.model, rest.replace(frozen=None)


def _joined(model, rest, frozen):
  whole = rest.replace(params=model) if rest.params is None else rest.replace(ema=model)
  return whole.replace(frozen=frozen)


def _check_shapes(stored, wanted):
  """Raises ValueError that names a parameter of another shape: orbax would find it only while it reads, and noisily."""
  stored, wanted = ({jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
                     for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]} for tree in (stored, wanted))
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise ValueError(f'it holds another model: {name} is {stored.get(name, "missing")} in it, '
                       f'{wanted.get(name, "unknown")} in config.json')


@contextlib.contextmanager
def _quiet():
  """Silences orbax and absl, whose notes about asynchronous internals would drown our own."""
  loggers = [logging.getLogger(name) for name in ('absl', 'orbax', 'asyncio')]
  levels = [logger.level for logger in loggers]
  try:
    for logger in loggers:
      logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)


class Checkpoints:
  """The checkpoints of one workdir. `say` receives one-line notes for the user; clean: remove half-written ones."""

  def __init__(self, workdir, keep=2, say=note, clean=False):
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self.say = say
    self._unreadable = set()
    policy = ocp.training.preservation_policies.LatestN(keep)
    try:
      with _quiet():
        self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=policy, cleanup_tmp_directories=clean)
    except OSError as error:
      raise UserError(f'cannot write to {workdir} ({error.strerror}): choose another --workdir') from None

  def steps(self):
    """Steps with a complete checkpoint, oldest first."""
    with _quiet():
      return sorted(c.step for c in self._orbax.checkpoints)

  def save(self, state, metadata):
    """Saves the state under its step, unless that is there already. Raises UserError when the disk is full.

    metadata: JSON-like, stored beside it. What was saved before stays until the new one is complete.
    """
    step = int(state.step)
    if step in self.steps() and step not in self._unreadable:
      return
    model, rest = _parts(state)
    self._write(step, {'model': model, 'training': rest}, metadata)

  def save_model(self, step, model, metadata):
    """Saves parameters alone, for inference."""
    self._write(step, {'model': model}, metadata)

  def _write(self, step, items, metadata):
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # the save is over before anybody could change them
    try:
      with context, _quiet():
        self._orbax.save_checkpointables(step, items, custom_metadata=metadata, force=True, overwrite=True)
      self._unreadable.discard(step)
    except Exception as error:  # orbax reports a full disk as OSError, ValueError or its own errors
      good = [s for s in self.steps() if s != step]
      reason = _first_line(error)
      raise UserError(
          f'could not save step {step} to {self.folder}: {reason}; free some space and run the same command again'
          + (f', it resumes from step {good[-1]}' if good else '')) from error

  def restore(self, like):
    """(state, metadata) of the newest readable checkpoint, or None when there is none. Skips unreadable ones, loudly.

    like: a state of the wanted structure, of shapes with the shardings to restore to. Raises UserError when there are
    checkpoints but none can be read.
    """
    model, rest = _parts(like)
    loaded = self._newest_readable({'model': model, 'training': rest})
    if loaded is None:
      return None
    items, _, metadata = loaded
    return _joined(items['model'], items['training'], like.frozen), metadata

  def restore_model(self, like, sharding, raw=False):
    """(parameters, step, metadata) of the newest readable checkpoint; UserError when there is none.

    raw: the parameters themselves, where `model` holds their average.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    loaded = self._newest_readable({'model': like})
    if loaded is None:
      raise UserError(f'no checkpoint in {self.folder}: train first, or point --workdir at a workdir that has one')
    items, step, metadata = loaded
    return self._raw(step, like) if raw else items['model'], step, metadata

  def _raw(self, step, like):
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
      with context, _quiet():
        return ocp.load(self.folder / str(step), {'params': like}, checkpointable_name='training')['params']
    except Exception as error:  # whatever a missing part makes orbax raise
      raise UserError(f'checkpoint {step} in {self.folder} keeps no raw parameters beside their average: '
                      'leave --raw out') from error

  def _newest_readable(self, wanted):
    steps, reasons = self.steps(), []
    for step in reversed(steps):
      try:
        with _quiet():
          stored = self._orbax.checkpointables_metadata(step)
          _check_shapes(stored.metadata['model'], wanted['model'])
          items, metadata = self._orbax.load_checkpointables(step, wanted), stored.custom_metadata
        if reasons:
          self.say(f'using checkpoint {step} instead')
        return items, step, metadata or {}
      except Exception as error:  # whatever a damaged file makes orbax raise
        reasons.append(_first_line(error))
      with _quiet():
        gc.collect()  # tasks that orbax left behind complain when they are collected
      self._unreadable.add(step)
      self.say(f'checkpoint {step} in {self.folder} cannot be read ({reasons[-1]})')
    if not steps:
      return None
    raise UserError(
        f'none of the checkpoints {steps} in {self.folder} can be read ({reasons[0]}): '
        'restore them from a copy, or move that folder away to start again')

  def newest_metadata(self):
    """The metadata of the newest checkpoint that has some to read, None when there is none."""
    for step in reversed(self.steps()):
      with contextlib.suppress(Exception), _quiet():  # a damaged one: `restore` says so
        if metadata := self._orbax.checkpointables_metadata(step).custom_metadata:
          return metadata
    return None

  def close(self):
    """Ends orbax's threads. Errors of a save have been raised by then."""
    with contextlib.suppress(Exception), _quiet():
      self._orbax.close()


def save_params(folder, params):
  """Writes parameters alone as an orbax checkpoint, for other programs: `ocp.load(folder)` gives nested dicts."""
  try:
    with _quiet():
      ocp.save(pathlib.Path(folder).absolute(), params)
  except Exception as error:  # see Checkpoints._write
    raise UserError(f'could not write {folder} ({_first_line(error)}): free some space') from error


def _first_line(error):
  """The innermost cause in one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:200]
