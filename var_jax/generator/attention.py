"""Attention between token maps: one function, softmax in float32, only over what is visible."""

import jax
import jax.numpy as jnp

LEAST_QUERIES = 64  # coarse scales are taken together until there are so many; a mask hides the finer ones among them


def attend(q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh, pyramid=None):
  """Softmax attention without further scaling of the queries; (B, L, H, Dh) in v's dtype.

  pyramid: whose tokens queries and keys are, each seeing its own and coarser scales; None when every key is visible.
  """
  # Heads first: the products over (L, M) are then plain batched ones, four times as fast on a CPU.
  q, k, v = (x.swapaxes(1, 2) for x in (q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh))
  if pyramid is None:
    return _softmax(q, k, v).swapaxes(1, 2)
  parts = []
  for start, end in query_ranges(pyramid):
    visible = pyramid.visible_LxL[start:end, :end]
    parts.append(_softmax(q[:, :, start:end], k[:, :, :end], v[:, :, :end], None if visible.all() else visible))
  return jnp.concatenate(parts, axis=2).swapaxes(1, 2)


def query_ranges(pyramid):
  """[(start, end)] of queries that are computed together, against the keys up to `end`."""
  ranges, start = [], 0
  for part in pyramid.slices:
    if part.stop - start >= LEAST_QUERIES or part.stop == pyramid.length:
      ranges.append((start, part.stop))
      start = part.stop
  return ranges


def _softmax(q_BxHxLxDh, k_BxHxMxDh, v_BxHxMxDh, visible_LxM=None):
  scores_BxHxLxM = jnp.einsum('bhld,bhmd->bhlm', q_BxHxLxDh, k_BxHxMxDh, preferred_element_type=jnp.float32)
  if visible_LxM is not None:
    scores_BxHxLxM = jnp.where(visible_LxM, scores_BxHxLxM, -jnp.inf)
  weights_BxHxLxM = jax.nn.softmax(scores_BxHxLxM, axis=-1).astype(v_BxHxMxDh.dtype)
  return jnp.einsum('bhlm,bhmd->bhld', weights_BxHxLxM, v_BxHxMxDh)
