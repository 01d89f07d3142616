"""The patch discriminator of the tokenizer's training (as in VQGAN, arXiv 2012.09841): one logit per image patch."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from var_jax.tokenizer.autoencoder import Norm
from var_jax.tokenizer.convolution import Conv


class PatchDiscriminator(nn.Module):
  """(B, H, W, 3) in [-1, 1] -> (B, h, w) float32 logits, positive where a patch looks real."""

  ch: int = 64
  layers: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    # Layers that the image is too small for are left out: each halves it.
    layers = max(1, min(self.layers, min(x.shape[1:3]).bit_length() - 3))
    for i in range(layers + 1):
      strides = 2 if i < layers else 1
      x = Conv(self.ch * min(2**i, 8), (4, 4), strides=strides, dtype=self.dtype, name=f'conv_{i}')(x)
      x = nn.leaky_relu(Norm(name=f'norm_{i}')(x) if i else x, 0.2)
    return Conv(1, (4, 4), dtype=self.dtype, name='conv_out')(x)[..., 0].astype(jnp.float32)
