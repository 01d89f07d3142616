"""Checkpoints: every bit comes back, damaged ones are passed over and replaced."""

import asyncio
import functools
import gc
import logging
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import differing, one_device, truncate

from var_jax.errors import UserError
from var_jax.training import checkpoint, checksums
from var_jax.training import mesh as mesh_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.state import TrainState


def small_state(step=0, ema=True, frozen=None):
  adam = optax.adam(0.1)
  params = {'w': jnp.arange(8.0) + step, 'deep': {'b': jnp.full((2, 3), 0.1)}}
  state = TrainState.create(3, params, adam, ema=ema, extra={'idle': jnp.arange(4)})
  state, _ = state.updated(jax.tree.map(jnp.cos, params), adam, ema_decay=0.5, extra={'idle': jnp.arange(4) + step})
  return state.replace(step=jnp.int32(step), frozen=frozen)


def saved(workdir, *steps, keep=5, keep_every=0, **options):
  with Checkpoints(workdir, keep, keep_every) as checkpoints:
    for step in steps:
      checkpoints.save(small_state(step, **options), {'tokenizer': f'name{step}'})
    checkpoints.finish()


def restored(workdir, devices=8, **options):
  """(state or None, metadata, what was said)."""
  said, state = [], small_state(**options)
  like = mesh_lib.placed(state, mesh_lib.make_mesh(jax.devices()[:devices])).replace(frozen=state.frozen)
  with Checkpoints(workdir, 5, say=said.append) as checkpoints:
    out = checkpoints.restore(like)
  return *(out or (None, None)), said


@pytest.mark.parametrize('ema', [True, False])
def test_checkpoint_gives_back_every_bit_but_what_is_frozen(tmp_path, ema):
  frozen = {'teacher': jnp.asarray(np.random.default_rng(0).normal(size=500_000), jnp.float32)}
  saved(tmp_path, 7, ema=ema, frozen=frozen)
  state, metadata, said = restored(tmp_path, ema=ema, frozen=frozen)
  assert differing(state, small_state(7, ema=ema, frozen=frozen)) == [] and said == []
  assert state.frozen['teacher'] is frozen['teacher'] and metadata['tokenizer'] == 'name7'
  assert (state.ema is None) == (not ema)
  assert sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file()) < 500_000


def test_no_checkpoint_is_no_error(tmp_path):
  assert restored(tmp_path) == (None, None, [])


def test_model_of_a_checkpoint_is_what_evaluation_uses(tmp_path):
  state = small_state(7)
  saved(tmp_path, 7)
  with Checkpoints(tmp_path) as checkpoints:
    params, step, metadata = checkpoints.restore_model(state.params, one_device())
  assert differing(params, state.ema) == [] and differing(params, state.params)
  assert step == 7 and metadata['tokenizer'] == 'name7'


def test_checkpoint_of_eight_devices_opens_on_one(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(mesh_lib.put_state(small_state(3), mesh_lib.make_mesh()), {})
  state, *_ = restored(tmp_path, devices=1)
  assert differing(state, small_state(3)) == []
  assert {x.sharding.num_devices for x in jax.tree.leaves(state.params)} == {1}
  saved(tmp_path, 4)
  state, *_ = restored(tmp_path)
  assert {x.sharding.num_devices for x in jax.tree.leaves(state.params)} == {8}


def test_newest_checkpoints_are_kept(tmp_path):
  saved(tmp_path, 1, 2, 3, 4, keep=2)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']
  saved(tmp_path, 4, keep=2)  # once more: nothing to do
  assert differing(restored(tmp_path)[0], small_state(4)) == []


def test_checkpoints_at_multiples_stay(tmp_path):
  saved(tmp_path, 1, 2, 3, 4, 5, 6, keep=1, keep_every=2)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4', '6']


def test_state_may_be_donated_while_it_is_saved(tmp_path):
  # The step after a save writes into the state's buffers while orbax still reads them.
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  state = small_state(3).replace(extra={'idle': jnp.arange(2.0**21)})
  before = jax.device_get(state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, {})
    for _ in range(20):
      state = step(state)
    checkpoints.finish()
    after = checkpoints.restore(mesh_lib.placed(state, mesh_lib.make_mesh()))[0]
  assert differing(before, after) == []


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'bool', 'uint32'])
def test_checksum_tells_every_bit_and_every_place_whatever_the_sharding(dtype):
  bits = np.random.default_rng(0).integers(0, 256, 8 * 6 * 4, dtype=np.uint8)
  x = (bits > 127).reshape(-1, 6) if dtype == 'bool' else bits.view(jnp.dtype(dtype)).reshape(-1, 6)
  whole = checksums.of({'x': x})
  mesh = mesh_lib.make_mesh(fsdp=2)
  for spec in (P(), P(('data', 'fsdp')), P(None, 'fsdp')):
    assert checksums.of({'x': jax.device_put(x, NamedSharding(mesh, spec))}) == whole
  swapped = x.copy()
  swapped[[1, 2]] = x[[2, 1]]
  with pytest.raises(ValueError, match='x is not what was saved'):
    checksums.check({'x': swapped}, whole)
  if dtype != 'bool':
    for place in range(8 * x.itemsize):
      flipped = x.copy()
      flipped.view(np.uint8).reshape(-1)[17 * x.itemsize + place // 8] ^= 1 << place % 8
      assert checksums.of({'x': flipped}) != whole


def test_values_that_changed_after_they_were_saved_are_found(tmp_path, monkeypatch):
  # A flipped bit that leaves the files' own structure whole: here the sums are those of other values.
  saved(tmp_path, 2)
  right = checksums.of
  with monkeypatch.context() as other:
    other.setattr(checksums, 'of', lambda tree: {name: value ^ 1 for name, value in right(tree).items()})
    saved(tmp_path, 4)
  state, _, said = restored(tmp_path)
  assert state.step == 2 and 'checkpoint 4' in said[0] and 'is not what was saved' in said[0]


def flip_values(folder):
  """Spoils the bytes of the arrays, not their number."""
  for file in folder.rglob('d/*'):
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


def remove(pattern):
  def damage(folder):
    files = [file for file in folder.rglob(pattern) if file.is_file()]
    assert files
    for file in files:
      file.unlink()
  return damage


def empty(folder):
  for path in sorted(folder.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()


def shorten(folder):
  for file in folder.rglob('d/*'):
    file.write_bytes(file.read_bytes()[:10])


def replace_by_file(folder):
  shutil.rmtree(folder)
  folder.write_text('mine')


DAMAGES = [truncate, flip_values, remove('manifest.ocdbt'), remove('_METADATA'), remove('_CHECKPOINT_METADATA'),
           remove('d/*'), shorten, empty, replace_by_file]
NAMES = ['truncated', 'spoiled', 'without_manifest', 'without_metadata', 'without_checksums', 'without_data',
         'shortened', 'empty', 'file']


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')  # tracebacks of threads, for users
@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_passed_over_and_said(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(2)) == [] and metadata['tokenizer'] == 'name2'
  assert 'checkpoint 4' in said[0] and 'cannot be read' in said[0] and 'using checkpoint 2' in said[1]
  assert all('\n' not in line for line in said)
  with Checkpoints(tmp_path, say=said.append) as checkpoints:
    params, step, _ = checkpoints.restore_model(small_state().params, one_device())
  assert step == 2 and differing(params, small_state(2).ema) == []


@pytest.mark.parametrize('lost', [
    TimeoutError('Timeout waiting'), ValueError('at barrier save. The original error raised was: INTERNAL')])
def test_lost_process_is_not_taken_for_a_damaged_checkpoint_or_a_full_disk(tmp_path, monkeypatch, lost):
  def lose(*args, **options):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    raise lost

  saved(tmp_path, 2)
  with Checkpoints(tmp_path) as checkpoints:
    read = lambda **options: checkpoints.restore_model(small_state().params, one_device(), **options)
    for owner, name, read in (
        (checkpoints._orbax, 'load_checkpointables', read),
        (checkpoint.ocp, 'load', functools.partial(read, raw=True)),
        (checkpoints._orbax, 'checkpointables_metadata', checkpoints.newest_metadata)):
      monkeypatch.setattr(owner, name, lose)
      with pytest.raises(type(lost)):
        read()
      monkeypatch.undo()
    monkeypatch.setattr(checkpoints._orbax, 'save_checkpointables_async', lose)
    with pytest.raises(type(lost)):
      checkpoints.save(small_state(4), {})
    monkeypatch.undo()


def test_calls_of_a_closed_loop_say_nothing(tmp_path, monkeypatch):
  """Not even once the checkpoints are left: threads of a failed read make them while the command ends."""
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', told.append)
  monkeypatch.setattr(checkpoint, '_no_late_calls', checkpoint._no_late_calls.__wrapped__)  # not once a process
  with Checkpoints(tmp_path):
    pass
  late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ('Event loop is closed', 'another'))
  sys.unraisablehook(late)
  sys.unraisablehook(other)
  assert other in told and late not in told


def test_reads_that_fail_later_say_nothing(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger('asyncio'), 'filters', [])  # what other tests have left
  async def fail():
    raise ValueError('as of a file that is gone')

  async def leave_behind():
    asyncio.create_task(fail())
    await asyncio.sleep(0)

  asyncio.run(leave_behind())
  gc.collect()
  assert 'never retrieved' in caplog.text
  caplog.clear()
  saved(tmp_path, 2, 4)
  truncate(tmp_path / 'checkpoints' / '4')
  restored(tmp_path)
  asyncio.run(leave_behind())
  gc.collect()
  assert 'never retrieved' not in caplog.text


@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_replaced_when_its_step_comes_again(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  with Checkpoints(tmp_path, say=lambda text: None) as checkpoints:
    checkpoints.restore(mesh_lib.placed(small_state(), mesh_lib.make_mesh()))
    checkpoints.save(small_state(4), {'tokenizer': 'again'})
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(4)) == [] and metadata['tokenizer'] == 'again' and said == []


def test_checkpoints_none_of_which_can_be_read_are_an_error(tmp_path):
  saved(tmp_path, 2, 4)
  truncate(tmp_path / 'checkpoints' / '2')
  shorten(tmp_path / 'checkpoints' / '4')
  why = r'none of the checkpoints \[2, 4\].*its list of arrays cannot be read.*restore them'
  with pytest.raises(UserError, match=why) as error:
    restored(tmp_path)
  assert '\n' not in str(error.value)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']  # nothing was cleared away


def test_stray_files_and_half_written_folders_are_no_checkpoints(tmp_path):
  saved(tmp_path, 2)
  folder = tmp_path / 'checkpoints'
  (folder / '4.orbax-checkpoint-tmp' / 'model').mkdir(parents=True)
  (folder / '6').mkdir()
  (folder / 'notes.txt').write_text('mine')
  (folder / 'backup').mkdir()
  state, _, _ = restored(tmp_path)
  assert state.step == 2
  saved(tmp_path, 3)
  assert restored(tmp_path)[0].step == 3
  assert (folder / 'notes.txt').read_text() == 'mine' and (folder / 'backup').is_dir()


def test_checkpoint_with_other_shapes_is_not_taken_for_this_model(tmp_path):
  saved(tmp_path, 2)
  with Checkpoints(tmp_path, say=lambda text: None) as checkpoints, pytest.raises(UserError):
    checkpoints.restore_model({'w': jnp.zeros(9), 'deep': {'b': jnp.zeros((2, 3))}}, one_device())
