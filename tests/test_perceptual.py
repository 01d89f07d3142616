"""LPIPS gives the reference implementation's numbers from its weights, and a finite gradient everywhere."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.errors import UserError
from var_jax.tokenizer import lpips

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def tensors():
  return golden_files.weights('', 'lpips_vgg_manifest.json')[1]


@pytest.fixture(scope='module')
def params(tensors):
  return lpips.from_torch(tensors)


@pytest.fixture(scope='module')
def pairs():
  golden = golden_files.load('lpips_vgg')
  return {name: golden[name].transpose(0, 2, 3, 1) for name in 'xy'} | {
      name: golden[name] for name in ('distance', 'per_layer')}


def test_distances_match_reference(params, pairs):
  layers = jax.jit(lpips.per_layer)(params, pairs['x'], pairs['y'])
  np.testing.assert_allclose(layers, pairs['per_layer'], rtol=1e-4)
  distance = jax.jit(lpips.distance)(params, pairs['x'], pairs['y'])
  assert distance.dtype == jnp.float32
  np.testing.assert_allclose(distance, pairs['distance'], rtol=1e-4)


def test_distance_is_symmetric_and_zero_for_equal_images(params, pairs):
  distance = jax.jit(lpips.distance)
  np.testing.assert_allclose(distance(params, pairs['y'], pairs['x']), pairs['distance'], rtol=1e-4)
  assert np.abs(distance(params, pairs['x'], pairs['x'])).max() < 1e-12  # the halves of a batch may round apart


def test_gradient_is_finite_where_a_layer_is_silent():
  """A position with every channel off has a norm of 0, whose square root has no slope."""
  x = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0].set(jnp.array([3., 0, 4]))
  np.testing.assert_allclose(lpips._unit_length(x)[0, 0], [[.6, 0, .8], [0, 0, 0]], rtol=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(lpips._unit_length(x)[..., 0]))(x)
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient[0, 0, 0], [.128, 0, -.096], rtol=1e-5)  # (1 - .36) / 5, 0, -.48 / 5


@pytest.mark.slow
def test_distance_falls_along_its_gradient(params, pairs):
  x, distance = jnp.asarray(pairs['x']), lambda x: lpips.distance(params, x, pairs['y']).sum()
  value, gradient = jax.jit(jax.value_and_grad(distance))(x)
  step = 1e-2 / jnp.linalg.norm(gradient)
  slope = (jax.jit(distance)(x - step * gradient) - value) / step
  np.testing.assert_allclose(slope, -jnp.sum(gradient ** 2), rtol=0.05)


def test_names_of_torchvision_and_of_the_whole_lpips_state_are_accepted(tensors, params, tmp_path):
  split = {'heads.npz': {}, 'vgg16.npz': {'classifier.0.weight': np.zeros(1)}}
  for name, value in tensors.items():
    split['heads.npz' if name.startswith('lin') else 'vgg16.npz'][name] = value
  for name, part in split.items():
    np.savez(tmp_path / name, **part)
  whole = {'scaling_layer.shift': np.zeros(3)} | {
      name.replace('features.', 'net.slice1.').replace('lin', 'lins.'): value for name, value in tensors.items()}
  for other in (lpips.load(tmp_path / 'vgg16.npz', tmp_path / 'heads.npz'), lpips.from_torch(whole)):
    jax.tree.map(np.testing.assert_array_equal, other, params)


def test_wrong_weights_are_named(tensors):
  with pytest.raises(UserError, match='missing lin0.model.1.weight'):
    lpips.from_torch({name: value for name, value in tensors.items() if name != 'lin0.model.1.weight'})
  with pytest.raises(UserError, match='unexpected features.1.weight'):
    lpips.from_torch(tensors | {'features.1.weight': np.zeros(1)})
  with pytest.raises(UserError, match=r'misshapen features.2.weight \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)'):
    lpips.from_torch(tensors | {'features.2.weight': np.zeros((64, 64, 1, 1))})
