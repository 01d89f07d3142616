"""Checkpoints: every bit comes back, damaged ones are passed over and replaced."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import differing, one_device, truncate

from var_jax.errors import UserError
from var_jax.training import mesh as mesh_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.state import TrainState


def small_state(step=0, ema=True, frozen=None):
  adam = optax.adam(0.1)
  params = {'w': jnp.arange(8.0) + step, 'deep': {'b': jnp.full((2, 3), 0.1)}}
  state = TrainState.create(3, params, adam, ema=ema, extra={'idle': jnp.arange(4)})
  state, _ = state.updated(jax.tree.map(jnp.cos, params), adam, ema_decay=0.5, extra={'idle': jnp.arange(4) + step})
  return state.replace(step=jnp.int32(step), frozen=frozen)


def saved(workdir, *steps, keep=5, **options):
  checkpoints = Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(small_state(step, **options), {'tokenizer': f'name{step}'})
  checkpoints.close()


def restored(workdir, devices=8, **options):
  """(state or None, metadata, what was said)."""
  said, state = [], small_state(**options)
  like = mesh_lib.placed(state, mesh_lib.make_mesh(jax.devices()[:devices])).replace(frozen=state.frozen)
  checkpoints = Checkpoints(workdir, 5, said.append)
  try:
    out = checkpoints.restore(like)
  finally:
    checkpoints.close()
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
  checkpoints = Checkpoints(tmp_path)
  params, step, metadata = checkpoints.restore_model(state.params, one_device())
  checkpoints.close()
  assert differing(params, state.ema) == [] and differing(params, state.params)
  assert step == 7 and metadata['tokenizer'] == 'name7'


def test_checkpoint_of_eight_devices_opens_on_one(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(mesh_lib.put_state(small_state(3), mesh_lib.make_mesh()), {})
  checkpoints.close()
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


DAMAGES = [truncate, flip_values, remove('manifest.ocdbt'), remove('_METADATA'), remove('d/*'), empty]
NAMES = ['truncated', 'spoiled', 'without_manifest', 'without_metadata', 'without_data', 'empty']


@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_passed_over_and_said(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(2)) == [] and metadata['tokenizer'] == 'name2'
  if damage is not empty:
    assert 'checkpoint 4' in said[0] and 'cannot be read' in said[0] and 'using checkpoint 2' in said[1]
  assert all('\n' not in line for line in said)
  checkpoints = Checkpoints(tmp_path, say=said.append)
  params, step, _ = checkpoints.restore_model(small_state().params, one_device())
  checkpoints.close()
  assert step == 2 and differing(params, small_state(2).ema) == []


@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_replaced_when_its_step_comes_again(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  checkpoints = Checkpoints(tmp_path, say=lambda text: None)
  checkpoints.restore(mesh_lib.placed(small_state(), mesh_lib.make_mesh()))
  checkpoints.save(small_state(4), {'tokenizer': 'again'})
  checkpoints.close()
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(4)) == [] and metadata['tokenizer'] == 'again' and said == []


def test_checkpoints_none_of_which_can_be_read_are_an_error(tmp_path):
  saved(tmp_path, 2, 4)
  for step in (2, 4):
    truncate(tmp_path / 'checkpoints' / str(step))
  with pytest.raises(UserError, match=r'none of the checkpoints \[2, 4\].*restore them') as error:
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
  checkpoints = Checkpoints(tmp_path, say=lambda text: None)
  with pytest.raises(UserError):
    checkpoints.restore_model({'w': jnp.zeros(9), 'deep': {'b': jnp.zeros((2, 3))}}, one_device())
  checkpoints.close()
