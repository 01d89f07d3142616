"""Checkpoints: `WORKDIR/checkpoints/STEP`, each with `model` (what inference needs) and `training` (all the rest).

The only file that speaks to orbax. A checkpoint appears under its final name once it is complete, and carries a
checksum of every array; the data's position is the step itself, since batch n depends on the seed and n alone.
"""

import contextlib
import functools
import logging
import pathlib
import sys

import jax
from orbax.checkpoint import v1 as ocp

from var_jax.errors import UserError, first_line, note
from var_jax.training import checksums, processes
from var_jax.training.quiet import no_logs, no_straggler, quiet


def _parts(state):
  """The state as (model, rest): the model's parameters are stored once, where inference finds them."""
  rest = state.replace(ema=None) if state.ema is not None else state.replace(params=None)
  return state.model, rest.replace(frozen=None)


def _joined(model, rest, frozen):
  whole = rest.replace(params=model) if rest.params is None else rest.replace(ema=model)
  return whole.replace(frozen=frozen)


def _check_shapes(stored, wanted):
  """Raises ValueError that names a parameter, missing or of another shape: orbax would find it late, and noisily."""
  stored, wanted = ({jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
                     for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]} for tree in (stored, wanted))
  if not stored:  # as orbax has it when it cannot read the list
    raise ValueError('its list of arrays cannot be read')
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise ValueError(f'it holds another model: {name} is {stored.get(name, "missing")} in it, '
                       f'{wanted.get(name, "unknown")} in config.json')


def _check_files(folder, items):
  """Raises ValueError that names a missing file: orbax would do without our checksums, or be noisy, or misleading."""
  of_items = [f'{item}/{file}' for item in items for file in ('_METADATA', 'manifest.ocdbt')]
  for name in ('_CHECKPOINT_METADATA', *of_items):
    if not (folder / name).is_file():
      raise ValueError(f'its {name} is missing')


def steps_on_disk(folder):
  """Steps that something in a folder of checkpoints is named after, oldest first; readable or not."""
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdecimal())


@functools.cache
def _no_late_calls():
  """Silences for good what tensorstore's threads do after an error: call a loop that orbax has closed, at any time."""
  hook = sys.unraisablehook
  sys.unraisablehook = lambda late: 'loop is closed' in str(late.exc_value) or hook(late)


class Checkpoints:
  """The checkpoints of one workdir, to be used in a `with`, which waits for the last save.

  keep: so many of the newest stay; keep_every: as do those of each multiple of so many steps (0: none); say: receives
  one-line notes for the user; clean: remove half-written ones; guard: raises UserError where nothing may be written.
  """

  def __init__(self, workdir, keep=2, keep_every=0, say=note, clean=False, guard=lambda: None):
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    if self.folder.is_file():
      raise UserError(f'{self.folder} is a file: move it away, or restore the folder of checkpoints')
    _no_late_calls()
    self.say, self.guard = say, guard
    self._unreadable = set()
    self._silence = no_logs()
    self._saving = None  # the step of a save that may be under way
    policies = ocp.training.preservation_policies
    policy = policies.LatestN(keep)
    if keep_every:
      policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])
    try:
      with quiet():
        self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=policy, cleanup_tmp_directories=clean)
    except OSError as error:
      raise UserError(f'cannot write to {workdir} ({error.strerror}): choose another --workdir') from None

  def __enter__(self):
    self._silence.__enter__()  # what is written in the background is to be silent too
    return self

  def __exit__(self, kind, error, traceback):
    if kind is None or jax.process_count() == 1:  # else others may be gone, for which orbax would wait minutes
      with contextlib.suppress(Exception), quiet():  # errors of a save are raised by `finish`
        self._orbax.close()
    self._silence.__exit__(None, None, None)

  def steps(self):
    """Steps with a complete checkpoint, oldest first."""
    with quiet():
      return sorted(c.step for c in self._orbax.checkpoints)

  def save(self, state, metadata):
    """Saves the state under its step, unless that is there already; returns once the state may be changed.

    The files are written in the background. Raises UserError when the save before this one failed; `finish` waits for
    the last. metadata: JSON-like, stored beside it. What was saved before stays until the new one is complete.
    """
    self.finish()
    step = int(state.step)
    if step in self.steps() and step not in self._unreadable:
      return
    self.guard()
    model, rest = _parts(state)
    self._write(step, {'model': model, 'training': rest}, metadata)

  def save_model(self, step, model, metadata):
    """Saves parameters alone, for inference; returns when they are saved."""
    self._write(step, {'model': model}, metadata)
    self.finish()

  def _write(self, step, items, metadata):
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # nobody changes them: jax donates no buffer that is being read
    metadata = metadata | {'checksums': checksums.of(items)}
    self._saving = step
    with self._saving_may_fail(), context:
      self._orbax.save_checkpointables_async(step, items, custom_metadata=metadata, force=True, overwrite=True)

  def finish(self):
    """Waits for the save under way, if any. Raises UserError when it failed, such as for a full disk."""
    if self._saving is not None:
      with self._saving_may_fail():
        self._orbax.wait()
      self._unreadable.discard(self._saving)
      self._saving = None

  @contextlib.contextmanager
  def _saving_may_fail(self):
    step = self._saving
    try:
      with quiet():
        yield
    except Exception as error:  # orbax reports a full disk as OSError, ValueError or its own errors
      self._saving = None
      if processes.is_loss(error):
        raise
      good = [s for s in self.steps() if s != step]
      reason = _cause(error)
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
      with context, quiet():
        params = ocp.load(self.folder / str(step), {'params': like}, checkpointable_name='training')
        checksums.check({'training': params}, self._stored(step)[1])
        return params['params']
    except Exception as error:  # whatever a missing part makes orbax raise
      if processes.is_loss(error):
        raise
      raise UserError(f'checkpoint {step} in {self.folder} keeps no raw parameters beside their average: '
                      'leave --raw out') from error

  def _newest_readable(self, wanted):
    # Of orbax's own list, spoiled ones are left out unsaid, such as an empty folder.
    steps, reasons, apart = _steps_of_all(self.folder), [], False
    for step in reversed(steps):
      items, metadata, failed = self._read(step, wanted)
      if not failed:
        if reasons:
          self.say(f'using checkpoint {step} instead')
        return items, step, metadata
      apart |= len(failed) < jax.process_count()
      reasons.append(_told(failed))
      logging.getLogger('asyncio').addFilter(no_straggler)
      self._unreadable.add(step)
      self.say(f'checkpoint {step} in {self.folder} cannot be read ({reasons[-1]})')
    if not steps:
      return None
    why = f'none of the checkpoints {steps} in {self.folder} can be read ({reasons[0]}): '
    if apart:
      raise processes.Apart(f'{why}some processes can read what others cannot: look at their storage, start all again')
    raise UserError(f'{why}restore them from a copy, or move that folder away to start again')

  def _read(self, step, wanted):
    """(items, metadata, {process: why it failed}) of a checkpoint, which all processes can read or none takes."""
    stored, failed = _try(self._look_at, step, wanted)
    if failed:
      return None, None, failed
    items, failed = _try(self._load, step, wanted)
    if failed:
      return None, None, failed
    sums, metadata = processes.from_first(stored)
    _, failed = _try(checksums.check, items, sums)
    return items, metadata, failed

  def _look_at(self, step, wanted):
    """(checksums, metadata) of a checkpoint whose files are there and hold what is wanted."""
    _check_files(self.folder / str(step), wanted)
    shapes, sums, metadata = self._stored(step)
    _check_shapes(shapes, wanted['model'])
    return sums, metadata

  def _load(self, step, wanted):
    """The items of a checkpoint, read by each process for itself: orbax would wait for one that cannot read its own."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'process_{index}')
    with ocp.Context(multiprocessing_options=alone):
      return self._orbax.load_checkpointables(step, wanted)

  def _stored(self, step):
    """(shapes of the model, checksums, metadata) of a checkpoint."""
    stored = self._orbax.checkpointables_metadata(step)
    metadata = dict(stored.custom_metadata or {})
    return stored.metadata['model'], metadata.pop('checksums', {}), metadata

  def newest_metadata(self):
    """The metadata of the newest checkpoint that has some that all processes can read, None when there is none."""
    for step in reversed(_steps_of_all(self.folder)):
      stored, failed = _try(lambda: self._stored(step)[1:])
      if not failed and any(stored):
        return processes.from_first(stored)[1]
    return None


def _try(function, *arguments):
  """(result, {process: why it failed}) of what every process does; no result unless all have one."""
  result = why = None
  try:
    with quiet():
      result = function(*arguments)
  except Exception as error:  # whatever a damaged file makes orbax raise
    if processes.is_loss(error):
      raise
    why = _cause(error)
  failed = {index: text for index, text in enumerate(processes.from_all(why)) if text is not None}
  return None if failed else result, failed


def _steps_of_all(folder):
  return sorted(set().union(*processes.from_all(steps_on_disk(folder))))


def _told(failed):
  """Why processes failed, in one line."""
  index, why = min(failed.items())
  return why if len(failed) == jax.process_count() else f'{why}, on process {index} of {jax.process_count()}'


def save_params(folder, params):
  """Writes parameters alone as an orbax checkpoint, for other programs: `ocp.load(folder)` gives nested dicts."""
  try:
    with quiet():
      ocp.save(pathlib.Path(folder).absolute(), params)
  except Exception as error:  # see Checkpoints._write
    raise UserError(f'could not write {folder} ({_cause(error)}): free some space') from error


def _cause(error):
  """The innermost cause in one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  return first_line(error)
