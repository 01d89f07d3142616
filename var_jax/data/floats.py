"""What a jitted step makes of the bytes of images."""

import jax.numpy as jnp


def floats(image):
  """uint8 (..., 3) in 0..255 -> float32 in [-1, 1], bit for bit as `images.to_float`; floats stay as they are.

  A compiled division may become a product with the reciprocal, off by a bit in most values. So the multiple of 2^-24
  that NumPy's division rounds to is found in whole numbers: 2^25/255 is 131586 and 2/255, whose share rounds to 0, 1
  or 2.
  """
  if image.dtype != jnp.uint8:
    return image
  value = image.astype(jnp.int32)
  return (131586 * value + jnp.minimum(value >> 6, 2) - 2**24).astype(jnp.float32) * jnp.float32(2**-24)
