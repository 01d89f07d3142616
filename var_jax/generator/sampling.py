"""Sampling a pyramid scale by scale, with key-value cache and guidance (VAR, arXiv 2404.02905, sec. 3.3 and appendix).

Editing is sampling with some tokens given (sec. 4.4): a keep mask says which.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from var_jax import axes
from var_jax.tokenizer import resize


class Choices(NamedTuple):
  """How tokens are drawn. 0 turns top_k and top_p off; smooth mixes codes by Gumbel softmax (prettier, worse FID).

  A cfg that is the number 0, and no array, leaves out the pass without class: half of the work.
  """

  cfg: Any = 1.5
  top_k: int = 900
  top_p: Any = 0.96
  temperature: Any = 1.0
  smooth: bool = False


class Sampled(NamedTuple):
  """tokens (B, L) int32, images (B, H, W, 3) float32 in [-1, 1], and per scale the guided logits and drawn tokens."""

  tokens_BxL: Any
  image_BxHxWx3: Any
  guided_logits: list
  drawn_tokens: list


def keep_likely(logits, top_k=0, top_p=0.0):
  """Logits with the unlikely entries at -inf: first all but the top_k, then the ascending mass <= 1 - top_p.

  Without sorting: the least logit that stays is found bit by bit, which takes 32 sums for each filter.
  """
  use_top_k, use_top_p = 0 < top_k < logits.shape[-1], not _is_zero(top_p)
  if not (use_top_k or use_top_p):
    return logits
  rank = _in_order(logits)
  kept, total = jnp.bool_(True), lambda x: jnp.sum(x, axis=-1, keepdims=True)
  if use_top_k:
    kept = rank >= _largest(lambda t: total(rank >= t) >= top_k, rank[..., :1])
  if use_top_p:
    mass = jnp.where(kept, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    dropped = (1 - top_p) * total(mass)
    kept &= rank >= _largest(lambda t: total(jnp.where(rank < t, mass, 0.0)) <= dropped, rank[..., :1])
  # The likeliest stays by its index: XLA may compute logits twice, rounded apart, and it would fall below itself.
  likeliest = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
  return jnp.where(kept | likeliest, logits, -jnp.inf)


def _in_order(x):
  """int32 in the order of float32 numbers."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(holds, like):
  """The largest int32, in the shape of `like`, for which `holds` is true, as it must be for all that are smaller."""

  def next_bit(i, least):
    more = least + (jnp.int32(1) << 31 - i)  # wraps from the smallest number to 0
    return jnp.where(holds(more), more, least)

  return jax.lax.fori_loop(0, 32, next_bit, jnp.full_like(like, -2**31))


def _is_zero(number):
  return isinstance(number, (int, float)) and number <= 0


def image_keys(seed, index_N):
  """(N,) keys: image i of a seed has the key fold_in(seed, i), whatever the batch that it is drawn in."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index_N)


def _gumbel(keys_B, scale, shape):
  """(B, *shape) noise; an image's noise depends on its own key and the scale alone."""
  return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, scale), shape))(keys_B)


def _draw(logits_BxlxV, keys_B, scale, scales, choices, codebook_VxC):
  """(tokens (B, l), codes (B, l, C)) of one scale."""
  logits_BxlxV = axes.constrain(logits_BxlxV, axes.BATCH)  # whole, or each of the filters' sums would cross devices
  logits = keep_likely(logits_BxlxV / choices.temperature, choices.top_k, choices.top_p)
  noise = _gumbel(keys_B, scale, logits.shape[1:])
  if not choices.smooth:
    tokens_Bxl = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    return tokens_Bxl, codebook_VxC[tokens_Bxl]
  progress = scale / max(scales - 1, 1)
  softness = max(0.27 * (1 - 0.95 * progress), 0.005)
  noisy = logits * (1 + progress) + noise
  return jnp.argmax(noisy, -1).astype(jnp.int32), jax.nn.softmax(noisy / softness, axis=-1) @ codebook_VxC


def keep_masks(keep_BxHxW, pyramid):
  """Which tokens of each scale stay as given: K bool arrays (B, h*w). A 1x1 scale always stays."""
  masks = []
  for size in pyramid.scales:
    mask = resize.bilinear(keep_BxHxW[..., None].astype(jnp.float32), size).reshape(keep_BxHxW.shape[0], -1) > 0.5
    masks.append(jnp.ones_like(mask) if size == (1, 1) else mask)
  return masks


def with_no_class(labels_B, generator):
  """(2B,): each label, and "no class" behind it: side by side, so that a batch split over devices stays in place."""
  return jnp.stack([labels_B, jnp.full_like(labels_B, generator.classes)], axis=1).reshape(-1)


def guided(logits_2BxlxV, t):
  """(B, l, V) logits with guidance t, from those of `with_no_class`: (1+t)·conditional - t·unconditional."""
  logits_Bx2xlxV = logits_2BxlxV.reshape(-1, 2, *logits_2BxlxV.shape[1:])
  return (1 + t) * logits_Bx2xlxV[:, 0] - t * logits_Bx2xlxV[:, 1]


def sample(generator, tokenizer, params, labels_B, keys_B, choices, given=None):
  """Draws one image per label: `Sampled`. Pure; jit it with generator, tokenizer and choices' static parts closed over.

  params: {'generator': ..., 'tokenizer': ...}; labels_B: (B,) int32 classes; keys_B: (B,) keys, one an image.
  given: None, or (tokens_BxL, keep_BxHxW) with the mask at the latent's size, True where the given tokens stay.
  Guidance grows with the scale: t = cfg·k/(K-1), see `guided`.
  """
  pyramid = generator.pyramid
  quantizer = tokenizer.bind({'params': params['tokenizer']}).quantizer
  model = generator.bind({'params': params['generator']})
  passes = 1 if _is_zero(choices.cfg) else 2
  labels_2B = labels_B if passes == 1 else with_no_class(labels_B, generator)
  masks = None if given is None else keep_masks(given[1], pyramid)
  total, inputs, cache = 0.0, None, model.empty_cache(labels_2B.shape[0])
  tokens, logits, drawn = [], [], []
  for k in range(len(pyramid)):
    logits_2BxlxV, cache = model.next_scale(labels_2B, k, inputs, cache)
    t = choices.cfg * k / max(len(pyramid) - 1, 1)
    logits.append(logits_2BxlxV if passes == 1 else guided(logits_2BxlxV, t))
    tokens_Bxl, codes_BxlxC = _draw(logits[-1], keys_B, k, len(pyramid), choices, quantizer.codebook)
    drawn.append(tokens_Bxl)
    if given is not None:
      known_Bxl = given[0][:, pyramid.slices[k]]
      codes_BxlxC = jnp.where(masks[k][..., None], quantizer.lookup(known_Bxl), codes_BxlxC)
      tokens_Bxl = jnp.where(masks[k], known_Bxl, tokens_Bxl)
    tokens.append(tokens_Bxl)
    total = total + quantizer.expand(codes_BxlxC, k)
    if k + 1 < len(pyramid):
      inputs = jnp.repeat(quantizer.shrink(total, k + 1), passes, axis=0)
  image = tokenizer.apply({'params': params['tokenizer']}, total, method='to_image')
  return Sampled(jnp.concatenate(tokens, axis=1), jnp.clip(image, -1, 1), logits, drawn)
