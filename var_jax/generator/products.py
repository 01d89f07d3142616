"""Products of activations with kernels: how a mesh lays them out, and the forms that are fast on one CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.axes import TENSOR, constrain, for_one_cpu


def gathering(*axes):
  """A product whose kernel, kept in parts over `fsdp`, is put together for it and laid out as `constrain` does.

  XLA would else take the product part by part and read the activations each time: twice the traffic on a TPU.
  """
  return lambda x, kernel, *how, **more: jax.lax.dot_general(x, constrain(kernel, *axes), *how, **more)


WHOLE, COLUMNS, ROWS = gathering(None), gathering(None, TENSOR), gathering(TENSOR)


def qkv_product(x_NxD, kernel_Dx3xD, *how, **more):
  """(N, 3, D): queries, keys and values; trained on a CPU, as one matrix, whose gradient XLA need not transpose."""
  if not for_one_cpu(x_NxD):
    return gathering(None, None, TENSOR)(x_NxD, kernel_Dx3xD, *how, **more)
  D = len(kernel_Dx3xD)
  return WHOLE(x_NxD, kernel_Dx3xD.reshape(D, -1), *how, **more).reshape(-1, 3, D)


def tall_product(x_NxF, kernel_FxD, dimensions, **more):
  """(N, D), for F > D: trained on a CPU, the kernel's gradient is a product of (D, F), 190 GFLOP/s for 165."""
  if not for_one_cpu(x_NxF):
    return ROWS(x_NxF, kernel_FxD, dimensions, **more)
  # Were its gradient no array of its own, XLA would transpose that product back.
  return jax.lax.dot_general(x_NxF, own_gradient(kernel_FxD.T), (((1,), (1,)), ((), ())), **more)


def own_gradient(x):
  """x, whose gradient is computed once on a CPU, for all that is made of it.

  XLA computes a sum within whatever reads it. The gradient of the tokens that go from block to block is one, over all
  later blocks: where these are unrolled, each would add it up several times.
  """
  return _identity(x) if for_one_cpu(x) else x


@jax.custom_vjp
def _identity(x):
  return x


def _apart(_, gradient):
  # XLA's compiler for CPUs puts nothing past a conditional, if its branches differ. The first one is for gradients
  # that no step can use.
  broken = jnp.isnan(gradient.reshape(-1)[0])
  return (jax.lax.cond(broken, lambda g: jnp.full_like(g, jnp.nan), lambda g: g, gradient),)


_identity.defvjp(lambda x: (x, None), _apart)


class Dense(nn.Dense):
  """nn.Dense on (..., features) seen as a matrix: with three axes, XLA's CPU gradients are half as fast."""

  @nn.compact
  def __call__(self, x):
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)
