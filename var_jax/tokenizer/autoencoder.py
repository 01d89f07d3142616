"""Encoder and decoder of the tokenizer: image <-> latent. The CompVis autoencoder that VAR's tokenizer uses (sec. 3.2).

Images are (B, H, W, 3) in [-1, 1]; the latent is (B, H/stride, W/stride, C) with stride 2**(len(ch_mult) - 1).
Convolutions run in `dtype`; norms and softmax in float32.
"""

import functools
import math
from typing import Any, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.remat import rematerialized
from var_jax.tokenizer import convolution


class Norm(nn.Module):
  """Group norm, computed in float32 and returned in x's dtype, with the channels' common divisor with `groups`."""

  groups: int = 32

  @nn.compact
  def __call__(self, x_BxHxWxC):
    groups = math.gcd(self.groups, x_BxHxWxC.shape[-1])
    return GroupNorm(groups, name='norm')(x_BxHxWxC.astype(jnp.float32)).astype(x_BxHxWxC.dtype)


class GroupNorm(nn.Module):
  """Over positions and each group's channels; flax's takes twice as long on a CPU, for it adds up a few at a time."""

  groups: int

  @nn.compact
  def __call__(self, x_BxHxWxC):
    C = x_BxHxWxC.shape[-1]
    scale_C = self.param('scale', nn.initializers.ones, (C,), jnp.float32)
    bias_C = self.param('bias', nn.initializers.zeros, (C,), jnp.float32)
    mean_Bx1x1xC = self._mean(x_BxHxWxC)
    # The variance does not change with the mean: without that gradient, the backward pass reads its arrays once less.
    variance_Bx1x1xC = self._mean((x_BxHxWxC - jax.lax.stop_gradient(mean_Bx1x1xC)) ** 2)
    return (x_BxHxWxC - mean_Bx1x1xC) * (jax.lax.rsqrt(variance_Bx1x1xC + 1e-6) * scale_C) + bias_C

  def _mean(self, x_BxHxWxC):
    """(B, 1, 1, C): of each channel's group, from the means of its channels."""
    B, _, _, C = x_BxHxWxC.shape
    means_BxGx1 = x_BxHxWxC.mean((1, 2)).reshape(B, self.groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(means_BxGx1, (B, self.groups, C // self.groups)).reshape(B, 1, 1, C)


def conv(features, size, dtype, name, train=False, **options):
  """A convolution; train: with gradients, see `convolution.conv_general_dilated`."""
  product = functools.partial(convolution.conv_general_dilated, train=train)
  return convolution.Conv(features, (size, size), dtype=dtype, name=name, conv_general_dilated=product, **options)


class ResBlock(nn.Module):
  """norm, swish, conv; twice; plus the input, through a 1x1 convolution where the channels change."""

  features: int
  dropout: float = 0.0
  groups: int = 32
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxHxWxC, train=False):
    h = conv(self.features, 3, self.dtype, 'conv1', train)(nn.swish(Norm(self.groups, name='norm1')(x_BxHxWxC)))
    h = nn.swish(Norm(self.groups, name='norm2')(h))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = conv(self.features, 3, self.dtype, 'conv2', train)(h)
    if x_BxHxWxC.shape[-1] != self.features:
      x_BxHxWxC = conv(self.features, 1, self.dtype, 'shortcut')(x_BxHxWxC)
    return x_BxHxWxC + h


def res_block(remat):
  """ResBlock, with a policy of `remat.POLICIES`."""
  return rematerialized(ResBlock, remat, static_argnums=(2,))  # whether it trains is no array


class AttnBlock(nn.Module):
  """Single-head self-attention over the positions of a feature map."""

  groups: int = 32
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxHxWxC):
    B, H, W, C = x_BxHxWxC.shape
    qkv = conv(3 * C, 1, self.dtype, 'qkv')(Norm(self.groups, name='norm')(x_BxHxWxC)).reshape(B, H * W, 3, C)
    q_BxNxC, k_BxNxC, v_BxNxC = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores_BxNxN = jnp.einsum('bnc,bmc->bnm', q_BxNxC, k_BxNxC, preferred_element_type=jnp.float32) * C**-0.5
    weights_BxNxN = jax.nn.softmax(scores_BxNxN, axis=-1).astype(self.dtype)
    out = jnp.einsum('bnm,bmc->bnc', weights_BxNxN, v_BxNxC).reshape(B, H, W, C)
    return x_BxHxWxC + conv(C, 1, self.dtype, 'proj')(out)


class Middle(nn.Module):
  """The stretch of encoder and decoder at the lowest resolution."""

  features: int
  dropout: float = 0.0
  groups: int = 32
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    block = res_block(self.remat)
    x = block(self.features, self.dropout, self.groups, self.dtype, name='block_1')(x, train)
    x = AttnBlock(self.groups, self.dtype, name='attn_1')(x)
    return block(self.features, self.dropout, self.groups, self.dtype, name='block_2')(x, train)


class Encoder(nn.Module):
  """Image (B, H, W, 3) -> features (B, H/stride, W/stride, channels)."""

  channels: int = 32
  ch: int = 160
  ch_mult: Sequence[int] = (1, 1, 2, 2, 4)
  res_blocks: int = 2
  dropout: float = 0.0
  groups: int = 32
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    x, block = conv(self.ch, 3, self.dtype, 'conv_in', train)(x), res_block(self.remat)
    last = len(self.ch_mult) - 1
    for level, mult in enumerate(self.ch_mult):
      for i in range(self.res_blocks):
        x = block(self.ch * mult, self.dropout, self.groups, self.dtype, name=f'down_{level}_block_{i}')(x, train)
        if level == last:
          x = AttnBlock(self.groups, self.dtype, name=f'down_{level}_attn_{i}')(x)
      if level < last:
        # Padding at the right and bottom alone, as the published network.
        x = conv(x.shape[-1], 3, self.dtype, f'down_{level}_conv', strides=2, padding=((0, 1), (0, 1)))(x)
    x = Middle(x.shape[-1], self.dropout, self.groups, self.remat, self.dtype, name='mid')(x, train)
    return conv(self.channels, 3, self.dtype, 'conv_out', train)(nn.swish(Norm(self.groups, name='norm_out')(x)))


class Decoder(nn.Module):
  """Features (B, h, w, channels) -> image (B, h*stride, w*stride, 3), not clipped."""

  ch: int = 160
  ch_mult: Sequence[int] = (1, 1, 2, 2, 4)
  res_blocks: int = 2
  dropout: float = 0.0
  groups: int = 32
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    last, block = len(self.ch_mult) - 1, res_block(self.remat)
    x = conv(self.ch * self.ch_mult[-1], 3, self.dtype, 'conv_in', train)(x)
    x = Middle(x.shape[-1], self.dropout, self.groups, self.remat, self.dtype, name='mid')(x, train)
    for level in reversed(range(len(self.ch_mult))):
      for i in range(self.res_blocks + 1):
        features = self.ch * self.ch_mult[level]
        x = block(features, self.dropout, self.groups, self.dtype, name=f'up_{level}_block_{i}')(x, train)
        if level == last:
          x = AttnBlock(self.groups, self.dtype, name=f'up_{level}_attn_{i}')(x)
      if level > 0:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = conv(x.shape[-1], 3, self.dtype, f'up_{level}_conv', train)(x)
    return conv(3, 3, self.dtype, 'conv_out', train)(nn.swish(Norm(self.groups, name='norm_out')(x)))
