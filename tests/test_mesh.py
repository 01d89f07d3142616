"""The mesh and its rules: what is split over which axis, and that constraints reach the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_runs import Trainer, farthest, moments, some_batch

from var_jax import axes
from var_jax.errors import UserError
from var_jax.generator.products import COLUMNS, Dense
from var_jax.training import mesh as mesh_lib


def mesh_of(data, fsdp, tensor):
  return mesh_lib.make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def test_sizes_make_up_the_devices():
  assert dict(mesh_lib.make_mesh().shape) == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert dict(mesh_of(-1, 2, 2).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert dict(mesh_of(1, -1, 4).shape) == {'data': 1, 'fsdp': 2, 'tensor': 4}
  for sizes in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (4, 1, 1), (1, 0, 8), (16, 1, 1)):
    with pytest.raises(UserError, match='mesh'):
      mesh_of(*sizes)
  with pytest.raises(UserError, match='such as --config.mesh.fsdp=4'):
    mesh_of(-1, 12, 1)


def test_slices_are_data():
  class Device:
    platform = 'tpu'

    def __init__(self, i):
      self.id, self.process_index, self.slice_index, self.coords = i, i // 4, i // 4, (i % 4, 0, 0)
      self.core_on_chip, self.device_kind = 0, 'TPU v5 lite'

  pod = [Device(i) for i in range(8)]
  mesh = mesh_lib.make_mesh(pod, data=0, fsdp=-1)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert [{device.slice_index for device in row.ravel()} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(UserError, match='such as --config.mesh.data=2'):
    mesh_lib.make_mesh(pod, data=1, fsdp=-1)
  assert dict(mesh_of(0, -1, 1).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}


def test_inference_takes_a_runs_mesh_as_far_as_it_fits():
  class Sizes:
    fsdp, tensor = 16, 2

  assert dict(mesh_lib.fitting(Sizes).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}
  Sizes.fsdp = 2
  assert dict(mesh_lib.fitting(Sizes, jax.devices()[:6]).shape) == {'data': 3, 'fsdp': 2, 'tensor': 1}
  assert dict(mesh_lib.fitting(Sizes, jax.devices()[:1]).shape) == {'data': 1, 'fsdp': 1, 'tensor': 1}


@pytest.mark.parametrize('name, shape, sizes, spec', [
    ('blocks/fc1/kernel', (4, 64, 256), (2, 2, 2), P(None, 'fsdp', 'tensor')),
    ('blocks/fc2/kernel', (4, 256, 64), (2, 2, 2), P(None, 'tensor', 'fsdp')),
    ('blocks/attention/qkv/kernel', (4, 64, 3, 64), (2, 2, 2), P(None, 'fsdp', None, 'tensor')),
    ('blocks/attention/proj/kernel', (4, 64, 64), (2, 2, 2), P(None, 'tensor', 'fsdp')),
    ('blocks/attention/q_bias', (4, 64), (2, 2, 2), P(None, 'tensor')),
    ('blocks/adaln/bias', (4, 384), (2, 2, 2), P(None, None)),
    ('head/kernel', (64, 4096), (1, 8, 1), P(None, 'fsdp')),
    ('head/kernel', (64, 4096), (8, 1, 1), P(None, None)),
    ('head/kernel', (64, 99), (2, 2, 2), P('fsdp', None)),  # 99 codes cannot be halved
    ('class_embedding', (1001, 64), (2, 2, 2), P(None, None)),
    ('encoder/conv_in/kernel', (3, 3, 3, 160), (1, 8, 1), P(None, None, None, 'fsdp')),
    ('decoder/conv_out/kernel', (3, 3, 5, 3), (1, 8, 1), P(None, None, None, None)),
    ('tokenizer/encoder/conv_in/kernel', (3, 3, 3, 160), (1, 8, 1), P(None, None, None, None)),  # not trained
    ('decoder/norm_out/norm/scale', (160,), (1, 8, 1), P(None)), ('', (), (1, 8, 1), P())])
def test_rules(name, shape, sizes, spec):
  assert mesh_lib.spec_of(name, shape, mesh_of(*sizes)) == spec


def test_moments_and_average_lie_where_their_parameters_do():
  trainer, mesh = Trainer('generator'), mesh_of(2, 2, 2)
  placed = mesh_lib.placed(trainer.initial, mesh)
  mu = placed.opt_state[1].mu
  for tree in (mu, placed.ema):
    assert jax.tree.map(lambda x: x.sharding.spec, tree) == jax.tree.map(lambda x: x.sharding.spec, placed.params)
  largest = max(jax.tree.leaves(placed.params), key=lambda x: x.size)
  assert set(jax.tree.leaves(tuple(largest.sharding.spec))) == {'fsdp', 'tensor'}
  share = lambda x: np.prod(x.sharding.shard_shape(x.shape)) / x.size
  whole = [x for x in jax.tree.leaves(placed.params) if share(x) == 1]
  assert sum(x.size for x in whole) < 0.1 * sum(x.size for x in jax.tree.leaves(placed.params))


@pytest.mark.parametrize('shape, spec', [
    ((4, 12, 3, 12), P(None, 'fsdp_rest', None, 'fsdp')), ((4, 12, 12), P(None, 'fsdp_rest', 'fsdp')),
    ((4, 12, 48), P(None, None, ('fsdp', 'fsdp_rest'))), ((4, 12, 5), P(None, 'fsdp', None)),
    ((4, 6, 5), P(None, 'fsdp_rest', None)), ((4, 5, 5), P(None, None, None))])
def test_kernels_that_fsdp_does_not_divide_are_split_along_two_dimensions(shape, spec):
  state = {'blocks': {'attention': {'proj': {'kernel': jax.ShapeDtypeStruct((4, 12, 12), jnp.float32)}}}}
  mesh = mesh_lib.suited(mesh_of(1, 8, 1), state)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 4, 'fsdp_rest': 2, 'tensor': 1}
  assert mesh.devices.ravel().tolist() == mesh_of(1, 8, 1).devices.ravel().tolist()
  assert mesh_lib.spec_of('blocks/a/kernel', shape, mesh) == spec


@pytest.mark.parametrize('devices, width', [(8, 12), (8, 20), (4, 6), (4, 32)])
def test_no_width_leaves_kernels_whole(devices, width):
  """Where the square of a width can be shared; and a width that all devices divide keeps the plain mesh."""
  stage = Trainer('generator', **{'model.width': width, 'model.heads': 1}).stage
  state = jax.eval_shape(stage.init)
  plain = mesh_lib.make_mesh(jax.devices()[:devices], data=1, fsdp=devices)
  mesh = mesh_lib.suited(plain, state)
  assert (mesh == plain) == (width % devices == 0)
  for path, x in jax.tree_util.tree_flatten_with_path(mesh_lib.placed(state, mesh).params['blocks'])[0]:
    if path[-1].key == 'kernel':
      assert np.prod(x.shape) == devices * np.prod(x.sharding.shard_shape(x.shape)), path


def test_what_stays_whole_is_said():
  kernel = lambda *shape: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  state = {'fc': kernel(16, 32), 'odd': kernel(16, 5), 'table': jax.ShapeDtypeStruct((2**18,), jnp.float32)}
  assert mesh_lib.undivided(state, mesh_of(1, 8, 1)) == (
      'fsdp: 1 of 3 parameters are not shared by all 8 devices: 1 MiB on each, with moments and average (table)')
  assert mesh_lib.undivided(state, mesh_of(8, 1, 1)) is None


def test_a_step_on_a_mesh_of_two_fsdp_axes_is_that_of_one_device():
  trainer = Trainer('generator', **{'model.width': 20})
  state, batch = trainer.initial, some_batch()
  mesh = mesh_lib.suited(mesh_of(1, 8, 1), state.replace(frozen=None))
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 4, 'fsdp_rest': 2, 'tensor': 1}
  with jax.set_mesh(mesh):
    placed = mesh_lib.put_state(state, mesh)
    places = jax.tree.map(lambda x: x.sharding, placed)
    step = jax.jit(trainer.stage.train_step, out_shardings=(places, mesh_lib.replicated(mesh)))
    found, metrics = step(placed, mesh_lib.put_batch(batch, mesh))
  image = mesh_lib.put_batch(batch, mesh)['image']
  assert {s.data.shape for s in image.addressable_shards} == {(1, 8, 8, 3)}
  expected, expected_metrics = trainer.step(state, batch)
  np.testing.assert_allclose(metrics['loss'], expected_metrics['loss'], rtol=1e-5)
  np.testing.assert_allclose(metrics['gradient_norm'], expected_metrics['gradient_norm'], rtol=1e-5)
  assert farthest(moments(found, 'mu'), moments(expected, 'mu')) < 1e-5


def test_batches_are_split_over_data_and_fsdp():
  image = mesh_lib.put_batch(some_batch(), mesh_of(2, 2, 2))['image']
  assert {s.data.shape for s in image.addressable_shards} == {(2, 8, 8, 3)}
  assert mesh_lib.process_part(mesh_of(2, 2, 2), 8) == (0, 1)
  mesh = mesh_of(2, 2, 2)
  for size, parts, shared in ((8, 2, True), (12, 1, True), (6, 1, False), (4, 2, False)):
    if shared:
      mesh_lib.check_batch(size, mesh, parts)
    else:
      with pytest.raises(UserError, match=f'batch_size {size} cannot be shared by 4'):
        mesh_lib.check_batch(size, mesh, parts)


def test_constraints_are_in_the_lowered_text():
  """Batches and heads; without them XLA would be free to gather everything on every device."""
  trainer = Trainer('generator', (2, 2, 2))
  text = trainer.step.lowered(trainer.initial, some_batch()).as_text()
  assert '"data"=2, "fsdp"=2, "tensor"=2' in text
  found = re.findall(r'sdy.sharding_constraint .*?<@\w+, (\[.*?\])>', text)
  heads = [spec for spec in found if re.search(r'\{"data", "fsdp"\}, \{\}, \{\}, \{"tensor"\}', spec)]
  hidden = [spec for spec in found if re.fullmatch(r'\[\{"data", "fsdp"\}, \{\}, \{"tensor"\}\]', spec)]
  assert heads and len(hidden) >= 3, found


def test_kernels_are_gathered_for_their_products():
  """Else XLA multiplies part by part: a kernel in parts over both axes is whole but for `tensor`."""
  with jax.set_mesh(mesh_of(2, 2, 2)):
    layer = Dense(64, use_bias=False, dot_general=COLUMNS)
    text = jax.jit(layer.apply).lower({'params': {'kernel': jnp.zeros((16, 64))}}, jnp.zeros((4, 16))).as_text()
  assert re.findall(r'sdy.sharding_constraint .*?<@\w+, (\[.*?\])>', text) == ['[{}, {"tensor"}]']


def test_constraint_leaves_alone_what_cannot_be_shared():
  with jax.set_mesh(mesh_of(2, 2, 2)):
    lowered = jax.jit(lambda x: axes.constrain(x, axes.BATCH, axes.TENSOR)).lower(jnp.zeros((6, 4))).as_text()
  assert '[{}, {"tensor"}]' in lowered
  assert axes.constrain(1, axes.BATCH) == 1  # no mesh, nothing happens
