"""Products in the forms that are fast on one CPU equal the plain ones, and XLA does not undo them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import optimizations

from var_jax.generator import losses, products
from var_jax.generator.transformer import Generator
from var_jax.pyramid import Pyramid

GENERATOR = Generator(Pyramid.of((1, 2, 3)), codes=16, channels=4, classes=3, depth=2, width=16, heads=2, unroll=True)


def test_a_tall_product_and_its_gradients_equal_the_plain_ones():
  shapes = (5, 12), (12, 4), (5, 4)
  x, kernel, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  dimensions = (((1,), (0,)), ((), ()))

  def with_gradients(product):
    return jax.value_and_grad(lambda *x: jnp.sum(weight * jnp.sin(product(*x, dimensions))), (0, 1))

  expected, found = (with_gradients(product)(x, kernel) for product in (products.ROWS, products.tall_product))
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  with optimizations():
    program = jax.jit(with_gradients(products.tall_product)).lower(x, kernel).compile().as_text()
  assert 'f32[4,12]{1,0} dot(' in program and 'f32[12,4]{1,0} dot(' not in program


@pytest.mark.parametrize('product, shape', [
    (products.WHOLE, (12, 4)), (products.qkv_product, (12, 3, 12)), (products.tall_product, (12, 4))])
def test_gradients_of_kernels_are_summed_in_float32_whatever_the_dtype(product, shape):
  """Of inputs that bfloat16 holds exactly, the kernel's gradient is that of float32, to float32's rounding."""
  exact = lambda i, shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
  x, kernel, pull = exact(0, (600, 12)), exact(1, shape).astype(jnp.float32), exact(2, (600, *shape[1:]))

  def gradients(dtype):
    out, pull_back = jax.vjp(lambda *inputs: product(*inputs, (((1,), (0,)), ((), ()))), x.astype(dtype), kernel)
    assert out.dtype == dtype
    return pull_back(pull.astype(dtype))

  (to_x, to_kernel), (exact_x, exact_kernel) = gradients(jnp.bfloat16), gradients(jnp.float32)
  assert (to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(to_kernel, exact_kernel, atol=1e-6 * np.abs(exact_kernel).max())
  np.testing.assert_allclose(to_x.astype(jnp.float32), exact_x, atol=2**-8 * np.abs(exact_x).max())


def test_own_gradient_is_the_same_one():
  loss = lambda x, own: jnp.sum(jnp.sin(own(jnp.sin(x) * x.mean())))
  x = jax.random.normal(jax.random.key(0), (4, 6))
  plain, own = (jax.grad(lambda x: loss(x, own)) for own in (lambda x: x, products.own_gradient))
  np.testing.assert_allclose(own(x), plain(x), rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(own)(x[None])[0], plain(x), rtol=1e-6)


@pytest.mark.parametrize('place, count', [((0, 0), 24), ((1, 2), 1)])
def test_no_nan_of_a_gradient_is_lost(place, count):
  weight = jnp.ones((4, 6)).at[place].set(jnp.nan)
  assert np.isnan(jax.grad(lambda x: jnp.sum(products.own_gradient(x) * weight))(weight)).sum() == count


@pytest.mark.parametrize('unroll', [True, False])
def test_gradients_of_blocks_stay_apart_in_the_program(unroll):
  """XLA removes a conditional whose branches are the same. A block has three: after attention, after fc2, of fc2."""
  generator = dataclasses.replace(GENERATOR, unroll=unroll)
  inputs = jnp.zeros(2, jnp.int32), jnp.zeros((2, 13, 4))
  params = generator.init(jax.random.key(0), *inputs)
  with optimizations():
    program = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(generator.apply(p, *inputs))))).lower(params).compile()
  assert program.as_text().count(' conditional(') == (6 if unroll else 3)


def test_right_tokens_are_those_of_the_argmax_also_where_logits_are_equal():
  rng = np.random.default_rng(0)
  logits, tokens = jnp.asarray(rng.integers(0, 3, (4, 50, 8)), jnp.float32), jnp.asarray(rng.integers(0, 8, (4, 50)))
  expected = np.argmax(logits, axis=-1) == tokens
  assert 0 < expected.sum() < expected.size
  np.testing.assert_array_equal(losses._right(logits, tokens), expected)
  assert not losses._right(logits.at[..., 0].set(jnp.nan), tokens).any()
