"""What runs in bfloat16, and what stays float32: parameters, their gradients, and all sums over devices."""


import jax.numpy as jnp


def of_activations(x, *parameters, dtype):
  """`promote_dtype` of flax's layers: x in a dtype, float32 parameters as they are; those of other types in it as well.

  A parameter that is converted first has its gradient converted back last: after the sum over devices. So products take
  float32 kernels and convert them within, see `products.gathering` and `convolution.product`.
  """
  return x.astype(dtype), *(p if p is None or p.dtype == jnp.float32 else p.astype(dtype) for p in parameters)
