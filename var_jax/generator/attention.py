"""Attention between token maps: one function, softmax in float32, only over what is visible.

xla: products of each range of queries with the keys that it sees; runs everywhere. cudnn: the same ranges, each by
cuDNN's fused kernel, which keeps no weights in memory; for GPUs, in bfloat16. splash: one Pallas kernel for TPUs that
leaves out blocks that are hidden. auto: what suits the devices.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from var_jax import axes
from var_jax.axes import CPU_CACHE
from var_jax.remat import ATTENTION

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')
DEVICES = {'cudnn': ('gpu', 'cuda'), 'splash': ('tpu',)}  # platforms of those that do not run everywhere
LEAST_QUERIES = 64  # coarse scales are taken together until there are so many; a mask hides the finer ones among them
TILE = 128  # splash attention takes lengths that are multiples of it


@flax.struct.dataclass
class Cache:
  """Keys and values (N, B, L, D) of the first `length` tokens in N layers, written in place; None to keep none.

  All heads lie in one axis: a TPU would fill up heads of 64 to 128.

  modulation: (N, B, 6, D) of adaptive layer norm, which depends on the class alone; None before the first scale.
  """

  keys: Any
  values: Any
  layer: Any  # the one that is being computed
  modulation: Any = None
  length: int = flax.struct.field(pytree_node=False, default=0)

  def extended(self, k_BxlxHxDh, v_BxlxHxDh):
    """(cache with one scale's keys and values in the layer, keys and values of all that the scale sees)."""
    if self.keys is None:
      return self, k_BxlxHxDh, v_BxlxHxDh
    B, l, H, Dh = k_BxlxHxDh.shape
    M, D = self.length + l, H * Dh
    put = lambda kept, new: jax.lax.dynamic_update_slice(
        kept, new.reshape(1, B, l, D), (self.layer, 0, self.length, 0))
    seen = lambda kept: jax.lax.dynamic_slice(kept, (self.layer, 0, 0, 0), (1, B, M, D)).reshape(B, M, H, Dh)
    keys, values = put(self.keys, k_BxlxHxDh), put(self.values, v_BxlxHxDh)
    cache = self.replace(keys=keys, values=values)
    # What was just put would be read in the loop that puts it, and XLA copy the whole cache, twice a layer.
    return (cache, seen(keys), seen(values)) if self.length else (cache, k_BxlxHxDh, v_BxlxHxDh)


def attend(q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh, pyramid=None, implementation='xla'):
  """Softmax attention without further scaling of the queries; (B, L, H, Dh) in v's dtype.

  pyramid: whose tokens queries and keys are, and which of them see each other; None when every key is visible.
  implementation: one of IMPLEMENTATIONS.
  """
  q, k, v = q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh
  implementation = chosen(implementation, v.dtype)
  if implementation == 'splash' and pyramid is not None:
    return _splash(q, k, v, pyramid)
  if implementation == 'cudnn':
    return checkpoint_name(_by_ranges(_cudnn, q, k, v, pyramid), ATTENTION)
  return checkpoint_name(_xla(q, k, v, pyramid), ATTENTION)


def chosen(implementation, dtype):
  """What 'auto' stands for on the devices of the mesh that is set, or else on those at hand."""
  if implementation != 'auto':
    return implementation
  kind = axes.platform()
  if kind in DEVICES['splash']:
    return 'splash'
  return 'cudnn' if kind in DEVICES['cudnn'] and dtype == jnp.bfloat16 else 'xla'


def query_ranges(pyramid):
  """[(first, start, end)]: queries from `start` to `end` are computed together, against the keys `first` to `end`."""
  ranges, start = [], 0
  for part in pyramid.slices:
    if part.stop - start >= LEAST_QUERIES or part.stop == pyramid.length:
      ranges.append((start if pyramid.markov else 0, start, part.stop))
      start = part.stop
  return ranges


def _by_ranges(core, q, k, v, pyramid, axis=1):
  """core(q, k, v, mask) over each range of queries; mask: None or (L, M) bool. Tokens lie along the axis."""
  if pyramid is None:
    return core(q, k, v, None)
  parts, cut = [], lambda x, start, end: jax.lax.slice_in_dim(x, start, end, axis=axis)
  for first, start, end in query_ranges(pyramid):
    visible = pyramid.visible_LxL[start:end, first:end]
    mask = None if visible.all() else jnp.asarray(visible)
    parts.append(core(cut(q, start, end), cut(k, first, end), cut(v, first, end), mask))
  return jnp.concatenate(parts, axis=axis)


def _xla(q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh, pyramid):
  # Heads first: the products over (L, M) are then plain batched ones, four times as fast on a CPU.
  q, k, v = (x.swapaxes(1, 2) for x in (q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh))
  if axes.for_one_cpu(q):
    return _some_heads_at_a_time(q, k, v, pyramid).swapaxes(1, 2)
  return _by_ranges(_softmax, q, k, v, pyramid, axis=2).swapaxes(1, 2)


def _some_heads_at_a_time(q_BxHxLxDh, k_BxHxMxDh, v_BxHxMxDh, pyramid):
  """(B, H, L, Dh). As many heads as a CPU's cache holds weights of, which the backward pass computes once more."""
  (B, H, L, _), M = q_BxHxLxDh.shape, k_BxHxMxDh.shape[2]
  pairs = [(end - start) * (end - first) for first, start, end in query_ranges(pyramid)] if pyramid else [L * M]
  fits = lambda n: B * H % n == 0 and 32 * n * max(pairs) <= CPU_CACHE  # eight float32 arrays, in the backward pass
  heads = max(filter(fits, range(1, B * H + 1)), default=1)
  if heads == B * H:
    return _by_ranges(_softmax, q_BxHxLxDh, k_BxHxMxDh, v_BxHxMxDh, pyramid, axis=2)
  some = lambda x: x.reshape(-1, heads, *x.shape[2:])
  one = jax.checkpoint(lambda qkv: _by_ranges(_exponentials, *qkv, pyramid))
  return jax.lax.map(one, tuple(map(some, (q_BxHxLxDh, k_BxHxMxDh, v_BxHxMxDh)))).reshape(q_BxHxLxDh.shape)


def _exponentials(q_HxLxDh, k_HxMxDh, v_HxMxDh, mask):
  """Softmax whose sums divide what comes out, not the weights."""
  scores_HxLxM = jnp.einsum('hld,hmd->hlm', q_HxLxDh, k_HxMxDh, preferred_element_type=jnp.float32)
  if mask is not None:
    scores_HxLxM = jnp.where(mask, scores_HxLxM, -jnp.inf)
  # What comes out does not depend on the largest: its gradient is zero, and would take two passes over all scores.
  weights_HxLxM = jnp.exp(scores_HxLxM - jax.lax.stop_gradient(scores_HxLxM.max(-1, keepdims=True)))
  out_HxLxDh = jnp.einsum('hlm,hmd->hld', weights_HxLxM.astype(v_HxMxDh.dtype), v_HxMxDh)
  return (out_HxLxDh / weights_HxLxM.sum(-1, keepdims=True)).astype(v_HxMxDh.dtype)


def _softmax(q_BxHxLxDh, k_BxHxMxDh, v_BxHxMxDh, mask):
  scores_BxHxLxM = jnp.einsum('bhld,bhmd->bhlm', q_BxHxLxDh, k_BxHxMxDh, preferred_element_type=jnp.float32)
  scores_BxHxLxM = checkpoint_name(scores_BxHxLxM, ATTENTION)
  if mask is not None:
    scores_BxHxLxM = jnp.where(mask, scores_BxHxLxM, -jnp.inf)
  weights_BxHxLxM = jax.nn.softmax(scores_BxHxLxM, axis=-1).astype(v_BxHxMxDh.dtype)
  return jnp.einsum('bhlm,bhmd->bhld', weights_BxHxLxM, v_BxHxMxDh)


def _cudnn(q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh, mask):
  if mask is not None:  # the coarse scales, a small part
    return _softmax(*(x.swapaxes(1, 2) for x in (q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh)), mask).swapaxes(1, 2)
  B, L, M = *q_BxLxHxDh.shape[:2], k_BxMxHxDh.shape[1]
  # jax 0.10 refuses odd lengths in training: they are filled up, with lengths that say so.
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BxLxHxDh, k_BxMxHxDh, v_BxMxHxDh))
  lengths = {'query_seq_lengths': jnp.full(B, L), 'key_value_seq_lengths': jnp.full(B, M)} if L % 2 or M % 2 else {}
  return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation='cudnn', **lengths)[:, :L]


def _splash(q, k, v, pyramid, interpret=False):
  """The kernel works on what one device has; lengths are filled up with tokens that nobody sees."""
  L, H, visible_MxM = pyramid.length, q.shape[2], _filled_up(pyramid)
  q, k, v = (jnp.pad(x, ((0, 0), (len(visible_MxM) - L, 0), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
  spec = axes.spec(q.shape, axes.BATCH, axes.TENSOR)
  run = jax.vmap(_kernel(visible_MxM, H // axes.parts(spec[1]), interpret))
  if any(spec):
    run = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
  return run(q, k, v).swapaxes(1, 2)[:, -L:].astype(v.dtype)


def _filled_up(pyramid):
  """A pyramid's mask, filled up in front to a multiple of TILE: the last scale then begins where a tile begins."""
  more = -pyramid.length % TILE
  visible_MxM = np.pad(pyramid.visible_LxL, (more, 0))
  visible_MxM[:more, 0] = True  # a query that sees nothing would divide by zero
  return visible_MxM


def _tile(length):
  return 2 * TILE if length % (2 * TILE) == 0 else TILE


def kernel_flops(pyramid, head_size):
  """{beginning of a splash kernel's name in a compiled program: its operations for one image and head}.

  By tiles of which anything is visible. Backwards, the weights are computed once more.
  """
  visible_MxM = _filled_up(pyramid)
  tile = _tile(len(visible_MxM))
  tiles = int(visible_MxM.reshape(-1, tile, len(visible_MxM) // tile, tile).any((1, 3)).sum())
  product = 2 * tiles * tile**2 * head_size
  return {'splash_mha_fwd': 2 * product, 'splash_mha_dkv': 5 * product}


def _kernel(visible_MxM, heads, interpret):
  """Splash attention of so many heads, each with the same mask."""
  mask, tile = splash_attention_mask.NumpyMask(visible_MxM), _tile(len(visible_MxM))
  sizes = splash_attention_kernel.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=tile, use_fused_bwd_kernel=True)
  return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      residual_checkpoint_name=ATTENTION, interpret=interpret)
