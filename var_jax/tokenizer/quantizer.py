"""The multi-scale residual quantizer (VAR, arXiv 2404.02905, sec. 3.2, algorithms 1 and 2).

A latent becomes a pyramid of token maps that share one codebook: each scale encodes what the coarser ones left over.
Everything here is float32, whatever the compute dtype.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.pyramid import Pyramid
from var_jax.tokenizer import resize


class Quantized(NamedTuple):
  """What training needs of one pass. L counts the tokens of all scales, C the latent's channels."""

  latent_BxHxWxC: Any  # straight-through: forward the decoded pyramid, backward the identity
  tokens_BxL: Any
  residuals_BxLxC: Any  # what each token had to encode; no gradient
  loss: Any  # codebook loss + beta * commitment loss, mean over the scales


def phi_index(scale, scales, layers):
  """Which of `layers` phi layers scale k of K uses: the one whose tick is nearest to k/(K-1)."""
  margin = 1 / (3 * layers) if layers == 4 else 1 / (2 * layers)
  ticks = np.linspace(margin, 1 - margin, layers)
  return int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1))))


class MultiScaleQuantizer(nn.Module):
  """Latent <-> token pyramid.

  phi_layers: 4 (published), 1, K (one per scale) or 0 (none); phi(x) = (1-phi_ratio)·x + phi_ratio·conv3x3(x).
  normalized_lookup: compare directions only (the published z-normalised variant).
  beta: weight of the commitment loss.
  """

  pyramid: Pyramid
  codes: int = 4096
  channels: int = 32
  phi_layers: int = 4
  phi_ratio: float = 0.5
  beta: float = 0.25
  normalized_lookup: bool = False

  def setup(self):
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform', in_axis=1, out_axis=0)
    self.codebook = self.param('codebook', init, (self.codes, self.channels), jnp.float32)
    self.phis = [nn.Conv(self.channels, (3, 3), precision='highest', name=f'phi_{i}') for i in range(self.phi_layers)]

  def _nearest(self, x_NxC):
    """(N,) int32: the nearest code of each vector, by Euclidean distance or by angle."""
    codebook_VxC = jax.lax.stop_gradient(self.codebook)
    if self.normalized_lookup:
      x_NxC = x_NxC / jnp.maximum(jnp.linalg.norm(x_NxC, axis=-1, keepdims=True), 1e-12)
      norms = jnp.linalg.norm(codebook_VxC, axis=-1, keepdims=True)
      return jnp.argmax(jnp.dot(x_NxC, (codebook_VxC / norms).T, precision='highest'), axis=-1).astype(jnp.int32)
    dots_NxV = jnp.dot(x_NxC, codebook_VxC.T, precision='highest')
    distances_NxV = jnp.sum(x_NxC**2, -1, keepdims=True) + jnp.sum(codebook_VxC**2, -1) - 2 * dots_NxV
    return jnp.argmin(distances_NxV, axis=-1).astype(jnp.int32)

  def lookup(self, tokens):
    """Codes of tokens: (...,) int32 -> (..., C)."""
    return self.codebook[tokens]

  def expand(self, codes_BxNxC, scale):
    """One scale's codes (B, h*w, C) as its share of the latent (B, H, W, C): bicubic, then phi."""
    size, full = self.pyramid.scales[scale], self.pyramid.last
    x = codes_BxNxC.reshape(codes_BxNxC.shape[0], *size, self.channels)
    x = resize.bicubic(x, full) if scale < len(self.pyramid) - 1 else x
    if not self.phi_layers or not self.phi_ratio:
      return x
    phi = self.phis[phi_index(scale, len(self.pyramid), self.phi_layers)]
    return (1 - self.phi_ratio) * x + self.phi_ratio * phi(x)

  def shrink(self, latent_BxHxWxC, scale):
    """A latent averaged down to one scale and flattened: (B, h*w, C). The last scale is not resized."""
    if scale < len(self.pyramid) - 1:
      latent_BxHxWxC = resize.area(latent_BxHxWxC, self.pyramid.scales[scale])
    return latent_BxHxWxC.reshape(latent_BxHxWxC.shape[0], -1, self.channels)

  def __call__(self, latent_BxHxWxC, kept_B=None):
    """Quantizes with straight-through gradient and losses (eq. 5): see `Quantized`.

    kept_B: how many scales make up each image's latent, None for all; tokens, residuals and loss are of all scales.
    """
    latent = latent_BxHxWxC.astype(jnp.float32)
    chex.assert_shape(latent, (None, *self.pyramid.last, self.channels))
    if self.is_initializing():  # few scales leave some phis without use, which have parameters all the same
      for phi in self.phis:
        phi(latent)
    fixed = jax.lax.stop_gradient(latent)
    decoded, losses, tokens, residuals, sums = jnp.zeros_like(fixed), [], [], [], []
    for k in range(len(self.pyramid)):
      residuals.append(self.shrink(jax.lax.stop_gradient(fixed - decoded), k))
      tokens.append(self._nearest(residuals[-1].reshape(-1, self.channels)).reshape(latent.shape[0], -1))
      decoded = decoded + self.expand(self.lookup(tokens[-1]), k)
      sums.append(decoded)
      commitment = jnp.mean((jax.lax.stop_gradient(decoded) - latent) ** 2)
      losses.append(self.beta * commitment + jnp.mean((decoded - fixed) ** 2))
    if kept_B is not None:  # not by an index into a stack of all, which would bring the devices' images together
      for k, partial in enumerate(sums[:-1]):
        decoded = jnp.where((kept_B == k + 1)[:, None, None, None], partial, decoded)
    straight_through = latent + jax.lax.stop_gradient(decoded - latent)
    tokens_BxL, residuals_BxLxC = jnp.concatenate(tokens, 1), jnp.concatenate(residuals, 1)
    return Quantized(straight_through, tokens_BxL, residuals_BxLxC, sum(losses) / len(losses))

  def encode(self, latent_BxHxWxC):
    """(B, H, W, C) -> (B, L) int32 tokens, coarse to fine (algorithm 1)."""
    return self(latent_BxHxWxC).tokens_BxL

  def decode(self, tokens_BxL, scales=None):
    """(B, L) tokens -> (B, H, W, C), the sum over the first `scales` scales (default: all; algorithm 2)."""
    return self.partial_sums(tokens_BxL)[(scales or len(self.pyramid)) - 1]

  def partial_sums(self, tokens_BxL):
    """The latent after each scale: K arrays (B, H, W, C), the last of which is `decode`."""
    chex.assert_shape(tokens_BxL, (None, self.pyramid.length))
    sums, total = [], 0.0
    for k, tokens in enumerate(self.pyramid.split(tokens_BxL)):
      total = total + self.expand(self.lookup(tokens), k)
      sums.append(total)
    return sums

  def teacher_input(self, tokens_BxL):
    """(B, L - first scale, C): what the generator sees at each scale but the first (sec. 3.2).

    Scale k's input is the sum of all coarser scales, averaged down to scale k.
    """
    sums = self.partial_sums(tokens_BxL)[:-1]
    inputs = [self.shrink(total, k + 1) for k, total in enumerate(sums)]
    if not inputs:
      return jnp.zeros((len(tokens_BxL), 0, self.channels))
    return jnp.concatenate(inputs, axis=1)
