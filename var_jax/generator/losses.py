"""Cross entropy over a pyramid, weighted by scale: the generator's loss (VAR, arXiv 2404.02905, eq. 6)."""

import jax
import jax.numpy as jnp
import numpy as np


def token_losses(logits_BxLxV, tokens_BxL, label_smoothing=0.0):
  """(B, L) float32 cross entropy of every token; smoothing as PyTorch's: uniform over all codes."""
  # Not by log_softmax, which would keep a second array of all logits for the backward pass.
  logits_BxLxV = logits_BxLxV.astype(jnp.float32)
  aim_BxL = jnp.take_along_axis(logits_BxLxV, tokens_BxL[..., None], axis=-1)[..., 0]
  if label_smoothing:
    aim_BxL = (1 - label_smoothing) * aim_BxL + label_smoothing * logits_BxLxV.mean(-1)
  return jax.nn.logsumexp(logits_BxLxV, axis=-1) - aim_BxL


def divergence(target_BxLxV, logits_BxLxV):
  """(B, L) Kullback-Leibler divergence from what some logits say to what others do, in nats."""
  target_BxLxV, found_BxLxV = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (target_BxLxV, logits_BxLxV))
  return jnp.sum(jnp.exp(target_BxLxV) * (target_BxLxV - found_BxLxV), axis=-1)


def _joins(steps, pyramid, start_scale, end, warmup):
  """(K,) the step at which each scale joins progressive training, 0 or less for those that take part from the start."""
  last = len(pyramid) - 1
  joins = np.zeros(last + 1, np.float32)
  span = max(end * steps - warmup, 0)
  for k in range(start_scale + 1, last + 1):
    # The published round(progress·(last-start)) reaches k - start at half a scale before.
    joins[k] = warmup + (k - start_scale - 0.5) / max(last - start_scale, 1) * span
  return joins


def taking_part(step, steps, pyramid, *, start_scale, end, warmup):
  """How many scales have a weight in `progressive_weights` at a step, which is a number here."""
  joins = _joins(steps, pyramid, start_scale, end, warmup)
  return int(np.sum((joins <= 0) | (step >= joins)))


def progressive_weights(step, steps, pyramid, *, start_scale, end, warmup, ramp):
  """(L,) weights of progressive training: scales join one by one, each ramped up; later scales weigh nothing.

  step: the current step of `steps`; start_scale: the finest scale trained at first; end: the fraction of the run by
  which all scales take part; warmup: steps before the second one joins; ramp: steps over which a new scale's weight
  grows from 0.01 to 1. Causality makes a weight of zero the same as leaving the scale out.
  """
  joins = _joins(steps, pyramid, start_scale, end, warmup)
  grown_K = jnp.clip((step - joins) / max(ramp, 1), 0.01, 1.0)
  weight_K = jnp.where(joins <= 0, 1.0, jnp.where(step >= joins, grown_K, 0.0))
  return weight_K[pyramid.level_L]


def scale_weights(pyramid, mean, sigma):
  """(L,) weights: the density of a log-normal distribution at (k+1)/K for scale k, scaled to a mean of 1."""
  place_K = np.arange(1, len(pyramid) + 1) / len(pyramid)
  exponent_K = -(np.log(place_K) - mean) ** 2 / (2 * sigma**2)
  weight_L = (np.exp(exponent_K - exponent_K.max()) / place_K)[pyramid.level_L]
  return (weight_L / weight_L.mean()).astype(np.float32)


def _right(logits_BxLxV, tokens_BxL):
  """(B, L) bool: whether the argmax is the token; False beside NaN. The argmax itself takes a CPU ten times as long."""
  aim_BxLx1 = jnp.take_along_axis(logits_BxLxV, tokens_BxL[..., None], axis=-1)
  before_BxLxV = jnp.arange(logits_BxLxV.shape[-1]) < tokens_BxL[..., None]  # of equal ones, the first counts
  return jnp.where(before_BxLxV, logits_BxLxV < aim_BxLx1, logits_BxLxV <= aim_BxLx1).all(-1)


def summarize(logits_BxLxV, tokens_BxL, pyramid, mask_B=None, label_smoothing=0.0):
  """Loss and accuracy in total, for the last scale and per scale: a dict of scalars, mean over images in the mask."""
  mask_B = jnp.ones(len(tokens_BxL)) if mask_B is None else mask_B

  def mean(x_BxL):
    return jnp.sum(x_BxL.mean(axis=1) * mask_B) / jnp.maximum(mask_B.sum(), 1)

  loss_BxL = token_losses(logits_BxLxV, tokens_BxL, label_smoothing)
  right_BxL = _right(logits_BxLxV, tokens_BxL).astype(jnp.float32)
  metrics = {'loss': mean(loss_BxL), 'accuracy': mean(right_BxL)}
  for k, s in enumerate(pyramid.slices):
    metrics[f'loss/scale_{k}'], metrics[f'accuracy/scale_{k}'] = mean(loss_BxL[:, s]), mean(right_BxL[:, s])
  last = len(pyramid) - 1
  metrics['loss/last'], metrics['accuracy/last'] = metrics[f'loss/scale_{last}'], metrics[f'accuracy/scale_{last}']
  return metrics
