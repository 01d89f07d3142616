"""Products in the forms that are fast on one CPU equal the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.generator import losses, products


def test_a_tall_product_and_its_gradients_equal_the_plain_ones():
  shapes = (5, 12), (12, 4), (5, 4)
  x, kernel, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  dimensions = (((1,), (0,)), ((), ()))

  def with_gradients(product):
    return jax.value_and_grad(lambda *x: jnp.sum(weight * jnp.sin(product(*x, dimensions))), (0, 1))(x, kernel)

  expected, found = with_gradients(products.ROWS), with_gradients(products.tall_product)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_own_gradient_changes_no_gradient_and_stays_apart_in_the_program():
  """XLA removes a conditional whose branches are the same, and whatever else it sees through."""
  def loss(x, apart):
    for _ in range(3):
      x = apart(x + jnp.sin(x) * x.mean())
    return jnp.sum(x * x)

  x = jax.random.normal(jax.random.key(0), (4, 6))
  program = jax.jit(jax.grad(lambda x: loss(x, products.own_gradient))).lower(x).compile()
  np.testing.assert_allclose(program(x), jax.grad(lambda x: loss(x, lambda x: x))(x), rtol=1e-5)
  assert program.as_text().count(' conditional(') == 3
  assert np.isnan(jax.grad(lambda x: jnp.sum(products.own_gradient(x) * jnp.nan))(x)).all()


def test_right_tokens_are_those_of_the_argmax_also_where_logits_are_equal():
  rng = np.random.default_rng(0)
  logits, tokens = jnp.asarray(rng.integers(0, 3, (4, 50, 8)), jnp.float32), jnp.asarray(rng.integers(0, 8, (4, 50)))
  expected = np.argmax(logits, axis=-1) == tokens
  assert 0 < expected.sum() < expected.size
  np.testing.assert_array_equal(losses._right(logits, tokens), expected)
