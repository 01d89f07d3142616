"""Products of activations with kernels: how a mesh lays them out, and the forms that are fast on one CPU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.axes import TENSOR, constrain, for_one_cpu, parts, platform
from var_jax.precision import of_activations


def gathering(*axes):
  """A product whose kernel, kept in parts over `fsdp`, is put together for it and laid out as `constrain` does.

  XLA would else take the product part by part and read the activations each time: twice the traffic on a TPU.
  """

  def product(x, kernel, *how, **more):
    if x.dtype != kernel.dtype:
      return _mixed_product(x, kernel, axes)
    return jax.lax.dot_general(x, constrain(kernel, *axes), *how, **more)

  return product


def _mixed_product(x_NxD, kernel_DxF, axes):
  """(N, F...) in x's dtype, to which a float32 kernel (D, F...) is converted. Sums over devices are float32.

  The kernel's gradient is a product whose result is float32, since devices add up what each has of it.
  """
  dtype, (first, last) = x_NxD.dtype, ((0,), (1,))
  ready = lambda kernel: constrain(kernel.astype(dtype), *axes)
  sums = jnp.float32 if parts(TENSOR) > 1 else dtype  # `tensor` may split what an activation is summed over

  def dot(a, b, which, out):
    if platform() == 'cpu':  # for which XLA has no product of bfloat16 that gives float32
      a, b = a.astype(out), b.astype(out)
    return jax.lax.dot_general(a, b, (which, ((), ())), preferred_element_type=out)

  @jax.custom_vjp
  def product(x_NxD, kernel_DxF):
    return dot(x_NxD, ready(kernel_DxF), (last, first), sums).astype(dtype)

  def gradients(kept, gradient_NxF):
    (x_NxD, kernel_DxF), features = kept, tuple(range(1, gradient_NxF.ndim))
    to_x_NxD = dot(gradient_NxF, ready(kernel_DxF), (features, features), sums).astype(dtype)
    return to_x_NxD, constrain(dot(x_NxD, gradient_NxF, (first, first), kernel_DxF.dtype), *axes)

  product.defvjp(lambda *inputs: (product(*inputs), inputs), gradients)
  return product(x_NxD, kernel_DxF)


WHOLE, COLUMNS, ROWS = gathering(None), gathering(None, TENSOR), gathering(TENSOR)


def qkv_product(x_NxD, kernel_Dx3xD, *how, **more):
  """(N, 3, D): queries, keys and values; trained on a CPU, as one matrix, whose gradient XLA need not transpose."""
  if not for_one_cpu(x_NxD) or x_NxD.dtype != kernel_Dx3xD.dtype:
    return gathering(None, None, TENSOR)(x_NxD, kernel_Dx3xD, *how, **more)
  D = len(kernel_Dx3xD)
  return WHOLE(x_NxD, kernel_Dx3xD.reshape(D, -1), *how, **more).reshape(-1, 3, D)


def tall_product(x_NxF, kernel_FxD, dimensions, **more):
  """(N, D), for F > D: trained on a CPU, the kernel's gradient is a product of (D, F), 190 GFLOP/s for 165."""
  if not for_one_cpu(x_NxF) or x_NxF.dtype != kernel_FxD.dtype:
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
  """nn.Dense on (..., features) seen as a matrix: with three axes, XLA's CPU gradients are half as fast.

  Returns its `dtype`; what it learns stays float32 up to the product and the sum with the bias.
  """

  promote_dtype: Any = of_activations

  @nn.compact
  def __call__(self, x):
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features).astype(self.dtype)
