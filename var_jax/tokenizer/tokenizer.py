"""The tokenizer: image <-> latent <-> token pyramid (VAR, arXiv 2404.02905, sec. 3.2)."""

from typing import Any, NamedTuple, Sequence

import flax.linen as nn
import jax.numpy as jnp

from var_jax import axes
from var_jax.errors import UserError
from var_jax.pyramid import Pyramid
from var_jax.tokenizer.autoencoder import Decoder, Encoder
from var_jax.tokenizer.convolution import Conv
from var_jax.tokenizer.quantizer import MultiScaleQuantizer, Quantized


class Reconstruction(NamedTuple):
  """One training pass: the image (B, H, W, 3), not clipped, and what the quantizer says of it."""

  image_BxHxWx3: Any
  quantized: Quantized


class Tokenizer(nn.Module):
  """Multi-scale VQ autoencoder. Images are (B, H, W, 3) in [-1, 1], tokens (B, L) int32, coarse to fine.

  Raises UserError when the pyramid's last scale is not the latent's size. Float32 outputs. remat: see `remat.POLICIES`.
  at_a_time: images that encoder and decoder take at a time on each device where they are not trained; 0 for all, on a
  CPU for those whose largest feature maps its cache can hold.
  """

  pyramid: Pyramid
  codes: int = 4096
  channels: int = 32
  ch: int = 160
  ch_mult: Sequence[int] = (1, 1, 2, 2, 4)
  res_blocks: int = 2
  dropout: float = 0.0
  groups: int = 32
  phi_layers: int = 4
  phi_ratio: float = 0.5
  beta: float = 0.25
  normalized_lookup: bool = False
  remat: str = 'none'
  at_a_time: int = 0
  dtype: Any = jnp.float32

  def setup(self):
    shared = dict(
        ch=self.ch, ch_mult=self.ch_mult, res_blocks=self.res_blocks, dropout=self.dropout, groups=self.groups,
        remat=self.remat, dtype=self.dtype)
    self.encoder = Encoder(channels=self.channels, **shared)
    self.decoder = Decoder(**shared)
    self.quantizer = MultiScaleQuantizer(
        self.pyramid, self.codes, self.channels, self.phi_layers, self.phi_ratio, self.beta, self.normalized_lookup)
    self.quant_conv = Conv(self.channels, (3, 3), dtype=self.dtype)
    self.post_quant_conv = Conv(self.channels, (3, 3), dtype=self.dtype)

  @property
  def stride(self):
    """Pixels per latent position and axis."""
    return 2 ** (len(self.ch_mult) - 1)

  @property
  def image_size(self):
    """(height, width) in pixels that the pyramid belongs to."""
    return tuple(side * self.stride for side in self.pyramid.last)

  def latent(self, image_BxHxWx3, train=False):
    """(B, H, W, 3) -> the latent before quantization, (B, h, w, C) float32."""
    if image_BxHxWx3.shape[1:3] != self.image_size:
      height, width = image_BxHxWx3.shape[1:3]
      raise UserError(
          f'an image of {height}x{width} pixels has a latent of {height / self.stride:g}x{width / self.stride:g}, but '
          f'the last scale is {self.pyramid.last[0]}x{self.pyramid.last[1]}: set the size to '
          f'{self.image_size[0]}x{self.image_size[1]} or end the scales with the latent\'s size')
    encode = lambda self, image: self.quant_conv(self.encoder(image, train)).astype(jnp.float32)
    return self._in_turn(encode, image_BxHxWx3, train)

  def to_image(self, latent_BxHxWxC, train=False):
    """A decoded latent (B, h, w, C) -> image (B, H, W, 3) float32, not clipped."""
    draw = lambda self, latent: self.decoder(self.post_quant_conv(latent), train).astype(jnp.float32)
    return self._in_turn(draw, latent_BxHxWxC, train)

  def _in_turn(self, function, x_BxHxWxC, train):
    """function(self, x), some images after the other where nothing is trained."""
    B = x_BxHxWxC.shape[0]
    if train or self.is_initializing() or not isinstance(B, int):  # an exported program's B is a symbol
      return function(self, x_BxHxWxC)
    each, (height, width) = B // axes.parts(axes.BATCH) or B, self.image_size
    suits = max(axes.CPU_CACHE // (4 * height * width * self.ch), 1) if axes.platform() == 'cpu' else each
    turns = next(n for n in range(-(-each // (self.at_a_time or suits)), B + 1) if B % n == 0)
    if turns == 1:
      return function(self, x_BxHxWxC)
    # Turn i takes every turns-th image, so that each device's share lies on that device already.
    x = x_BxHxWxC.reshape(-1, turns, *x_BxHxWxC.shape[1:]).swapaxes(0, 1)
    one = lambda self, carry, x: (carry, function(self, x))
    _, out = nn.scan(one, variable_broadcast='params', split_rngs={'params': False})(self, None, x)
    return out.swapaxes(0, 1).reshape(B, *out.shape[2:])

  def __call__(self, image_BxHxWx3, kept_B=None, train=False):
    """Image -> Reconstruction, with straight-through gradient. kept_B: scales to decode from, None for all."""
    quantized = self.quantize(image_BxHxWx3, kept_B, train)
    return Reconstruction(self.to_image(quantized.latent_BxHxWxC, train), quantized)

  def quantize(self, image_BxHxWx3, kept_B=None, train=False):
    """As `__call__`, without drawing the image: `Quantized`."""
    return self.quantizer(self.latent(image_BxHxWx3, train), kept_B)

  def encode(self, image_BxHxWx3):
    """(B, H, W, 3) in [-1, 1] -> (B, L) int32."""
    return self.quantizer.encode(self.latent(image_BxHxWx3))

  def decode(self, tokens_BxL, scales=None):
    """(B, L) -> (B, H, W, 3) clipped to [-1, 1], from the first `scales` scales (default: all)."""
    return jnp.clip(self.to_image(self.quantizer.decode(tokens_BxL, scales)), -1, 1)

  def decode_every_scale(self, tokens_BxL):
    """(B, L) -> (B, K, H, W, 3) clipped to [-1, 1]: the picture after every scale."""
    sums_KxBxHxWxC = jnp.stack(self.quantizer.partial_sums(tokens_BxL))
    draw = lambda self, carry, latent: (carry, jnp.clip(self.to_image(latent), -1, 1))
    # One after the other: a single decoder is compiled, and no more memory is taken than for one scale.
    _, images = nn.scan(draw, variable_broadcast='params', split_rngs={'params': False})(self, None, sums_KxBxHxWxC)
    return images.swapaxes(0, 1)

  def teacher_input(self, tokens_BxL):
    """(B, L) -> (B, L - first scale, C), see `MultiScaleQuantizer.teacher_input`."""
    return self.quantizer.teacher_input(tokens_BxL)
