"""Products of activations with kernels: how a mesh lays them out, and the forms that are fast on one CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.axes import TENSOR, constrain, one_cpu


def gathering(*axes):
  """A product whose kernel, kept in parts over `fsdp`, is put together for it and laid out as `constrain` does.

  XLA would else take the product part by part and read the activations each time: twice the traffic on a TPU.
  """
  return lambda x, kernel, *how, **more: jax.lax.dot_general(x, constrain(kernel, *axes), *how, **more)


WHOLE, COLUMNS, ROWS = gathering(None), gathering(None, TENSOR), gathering(TENSOR)


def qkv_product(x_NxD, kernel_Dx3xD, *how, **more):
  """(N, 3, D): queries, keys and values; trained on a CPU, as one matrix, whose gradient XLA need not transpose."""
  if not one_cpu() or not isinstance(x_NxD.shape[0], int):  # exported, N may be a symbol, and the device any
    return gathering(None, None, TENSOR)(x_NxD, kernel_Dx3xD, *how, **more)
  D = len(kernel_Dx3xD)
  return WHOLE(x_NxD, kernel_Dx3xD.reshape(D, -1), *how, **more).reshape(-1, 3, D)


def own_gradient(x):
  """x, whose gradient a CPU computes once, for all that is made of it.

  Else XLA adds up in each block what all later blocks give to it, which grows with the square of the depth.
  """
  if not one_cpu():
    return x

  def transpose(_, gradient):
    # XLA computes a sum within what reads it, and anew in each reader, but moves nothing past a conditional.
    broken = jnp.isnan(gradient.reshape(-1)[0])
    return jax.lax.cond(broken, lambda g: jnp.full_like(g, jnp.nan), lambda g: g, gradient)

  return jax.custom_derivatives.linear_call(lambda _, x: x, transpose, (), x)


def tall_product(x_NxF, kernel_FxD, dimensions, **more):
  """ROWS for F > D: the kernel's gradient is computed as (D, F) on a CPU, a sixth faster there."""
  if not one_cpu():
    return ROWS(x_NxF, kernel_FxD, dimensions, **more)
  return jax.lax.dot_general(x_NxF, own_gradient(kernel_FxD.T), (((1,), (1,)), ((), ())), **more)


class Dense(nn.Dense):
  """nn.Dense on (..., features) seen as a matrix: with three axes, XLA's CPU gradients are half as fast."""

  @nn.compact
  def __call__(self, x):
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)
