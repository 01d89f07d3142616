"""Losses of the tokenizer's training. The published code has none: these follow VQGAN (arXiv 2012.09841, sec. 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np


def hinge(real_logits, fake_logits):
  """The discriminator's loss: real patches above 1, drawn ones below -1."""
  return 0.5 * (jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits)))


def balanced(gradient_BxHxWx3, adversarial_loss, image_BxHxWx3, weight):
  """A reconstruction loss's gradient at the image plus an adversarial loss's, the latter scaled to the former's size.

  adversarial_loss: a function of the image. Returns (gradient (B, H, W, 3), adversarial loss, factor): the factor
  weight·|d reconstruction loss|/|d adversarial loss| is VQGAN's (eq. 7), taken at the decoder's output rather than at
  its last layer, which saves two passes through the decoder.
  """
  adversarial, pull_BxHxWx3 = jax.value_and_grad(adversarial_loss)(image_BxHxWx3)
  norm = lambda x: jnp.sqrt(jnp.sum(x * x))
  factor = weight * jnp.clip(norm(gradient_BxHxWx3) / (norm(pull_BxHxWx3) + 1e-8), 0, 1e4)
  return gradient_BxHxWx3 + factor * pull_BxHxWx3, adversarial, factor


def psnr(image_BxHxWx3, other_BxHxWx3):
  """(B,) peak signal-to-noise ratio in dB of images in [-1, 1]."""
  mean_square = jnp.mean((image_BxHxWx3 - other_BxHxWx3) ** 2, axis=(1, 2, 3))
  return 10 * jnp.log10(4 / jnp.maximum(mean_square, 1e-10))


def codebook_use(counts_V):
  """(usage, perplexity) of one scale, from how often each code occurred.

  Usage is the share of codes that occurred; perplexity, in codes, the exponential of the entropy of their frequencies.
  """
  share_V = counts_V / counts_V.sum()
  return float(np.mean(counts_V > 0)), float(np.exp(-np.sum(share_V * np.log(np.maximum(share_V, 1e-12)))))
