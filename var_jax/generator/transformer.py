"""The scale-wise transformer (VAR, arXiv 2404.02905, sec. 3.3): class and coarser token maps -> the next token map.

Parameters are float32; activations run in `dtype`; norms, softmax and logits in float32. The blocks are scanned, so
their parameters carry a leading axis of size depth, and compile time does not grow with it.
"""

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.axes import BATCH, TENSOR, constrain
from var_jax.generator.attention import Cache, attend
from var_jax.generator.products import COLUMNS, ROWS, WHOLE, Dense, own_gradient, qkv_product, tall_product
from var_jax.precision import of_activations
from var_jax.pyramid import Pyramid
from var_jax.remat import rematerialized

MAX_LOG_SCALE = math.log(100)


def layer_norm(x):
  """Layer norm without parameters, in float32."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def unit(x):
  """x over its length along the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def adaln_init(std, width, scale, gamma_scale):
  """Normal with `std`, times gamma_scale in the two gamma chunks (the first 2·width columns), times scale elsewhere."""

  def init(key, shape, dtype=jnp.float32):
    columns = jnp.arange(shape[-1]) < 2 * width
    return std * jax.random.normal(key, shape, dtype) * jnp.where(columns, gamma_scale, scale)

  return init


class Attention(nn.Module):
  """Multi-head self-attention. Queries and values have a bias, keys have none.

  normalize_qk: queries and keys of unit length, queries scaled per head by exp(min(learned, log 100));
  otherwise scaled dot product with 0.25/sqrt(head size).
  """

  width: int
  heads: int
  normalize_qk: bool
  init_std: float
  proj_std: float
  pyramid: Pyramid
  implementation: str
  dtype: Any

  @nn.compact
  def __call__(self, x_BxLxD, cache=None):
    B, L, D = x_BxLxD.shape
    normal = nn.initializers.normal
    # Queries, keys and values have a dimension of their own, so that `tensor` can split each of them by heads.
    qkv = nn.DenseGeneral((3, D), use_bias=False, dtype=self.dtype, kernel_init=normal(self.init_std), name='qkv',
                         dot_general=qkv_product, promote_dtype=of_activations)
    qkv_Nx3xD = qkv(x_BxLxD.reshape(-1, D))
    q_bias, v_bias = (self.param(name, nn.initializers.zeros, (D,), jnp.float32) for name in ('q_bias', 'v_bias'))
    qkv_Nx3xD = (qkv_Nx3xD + jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias])).astype(self.dtype)
    qkv = constrain(qkv_Nx3xD.reshape(B, L, 3, self.heads, D // self.heads), BATCH, None, None, TENSOR)
    q, k, v = (qkv[:, :, i] for i in range(3))
    if self.normalize_qk:
      log_scale_H = self.param('log_scale', nn.initializers.constant(math.log(4)), (self.heads,), jnp.float32)
      q = unit(q) * jnp.exp(jnp.minimum(log_scale_H, MAX_LOG_SCALE))[:, None]
      k = unit(k).astype(self.dtype)
    else:
      q = q * (0.25 / math.sqrt(D // self.heads))
    if cache is not None:
      cache, k, v = cache.extended(k, v)
    out = attend(q.astype(self.dtype), k, v, self.pyramid if cache is None else None, self.implementation)
    out = constrain(out.reshape(B, L, D), BATCH, None, TENSOR)
    proj = Dense(D, dtype=self.dtype, kernel_init=normal(self.proj_std), dot_general=ROWS, name='proj')
    return proj(out), cache


class Block(nn.Module):
  """One transformer block with adaptive layer norm.

  carry: tokens (B, L, D), and None when they are a whole pyramid's, or else a `Cache` of the coarser scales; keep_2xB:
  drop-path factors of the two branches (0 or 1/keep probability), None to keep all; chunks_Bx6xD: what an earlier call
  returned as its second value, None to compute it from cond: class embedding (B, D), or (B, 6, D) when AdaLN is shared.
  Returns what the next block takes as carry, and with a cache the chunks.
  """

  width: int
  heads: int
  mlp_ratio: float
  normalize_qk: bool
  shared_adaln: bool
  init_std: float
  proj_std: float
  adaln_scale: float
  adaln_gamma: float
  pyramid: Pyramid
  attention: str
  dtype: Any

  @nn.compact
  def __call__(self, carry, keep_2xB, chunks_Bx6xD, cond):
    (x_BxLxD, cache), D = carry, self.width
    chunks_Bx6xD = self._modulation(cond) if chunks_Bx6xD is None else chunks_Bx6xD
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (chunks_Bx6xD[:, i, None] for i in range(6))

    attention = Attention(
        D, self.heads, self.normalize_qk, self.init_std, self.proj_std, self.pyramid, self.attention,
        self.dtype, name='attention')
    h = (layer_norm(x_BxLxD) * (scale1 + 1) + shift1).astype(self.dtype)
    h, cache = attention(h, cache)
    x_BxLxD = own_gradient(x_BxLxD + self._drop_path(h * gamma1, keep_2xB, 0))

    h = (layer_norm(x_BxLxD) * (scale2 + 1) + shift2).astype(self.dtype)
    normal = nn.initializers.normal
    fc1 = Dense(round(D * self.mlp_ratio), dtype=self.dtype, kernel_init=normal(self.init_std), dot_general=COLUMNS,
                name='fc1')
    fc2 = Dense(D, dtype=self.dtype, kernel_init=normal(self.proj_std), dot_general=tall_product, name='fc2')
    h = fc2(nn.gelu(constrain(fc1(h), BATCH, None, TENSOR), approximate=True))
    x_BxLxD = own_gradient(constrain(x_BxLxD + self._drop_path(h * gamma2, keep_2xB, 1), BATCH))
    if cache is None:
      return (x_BxLxD, None), None
    return (x_BxLxD, cache.replace(layer=cache.layer + 1)), chunks_Bx6xD

  def _modulation(self, cond):
    D = self.width
    if self.shared_adaln:
      init = adaln_init(1 / math.sqrt(D), 2, self.adaln_scale, self.adaln_gamma)
      offsets_6xD = self.param('adaln', lambda key, shape: init(key, (D, 6)).T, (6, D))
      return constrain((cond + offsets_6xD).astype(self.dtype), BATCH)
    init = adaln_init(self.init_std, D, self.adaln_scale, self.adaln_gamma)
    adaln = Dense(6 * D, dtype=self.dtype, kernel_init=init, dot_general=ROWS, name='adaln')
    return constrain(adaln(nn.silu(cond)).reshape(-1, 6, D), BATCH)

  def _drop_path(self, h_BxLxD, keep_2xB, branch):
    return h_BxLxD if keep_2xB is None else h_BxLxD * keep_2xB[branch][:, None, None].astype(self.dtype)


class Generator(nn.Module):
  """Class labels and a pyramid's coarser scales -> logits of every token.

  codes, channels: the tokenizer's codebook; classes: label `classes` means "no class" (for guidance).
  width, heads: by default 64·depth and depth. Initial values as published; adaln_gamma is the recipe's own.
  remat: see `remat.POLICIES`; attention: see `attention.IMPLEMENTATIONS`; unroll: no loop over the blocks.
  float32_residual: whether the blocks' outputs are added up in float32, where each block runs in another `dtype`.
  """

  pyramid: Pyramid
  codes: int = 4096
  channels: int = 32
  classes: int = 1000
  depth: int = 16
  width: int = 0
  heads: int = 0
  mlp_ratio: float = 4.0
  normalize_qk: bool = True
  shared_adaln: bool = False
  adaln_gamma: float = 1e-3
  adaln_scale: float = 0.5
  head_scale: float = 0.02
  remat: str = 'none'
  attention: str = 'auto'
  unroll: bool = False
  float32_residual: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    D, std = self.width or 64 * self.depth, self.init_std
    normal = nn.initializers.normal
    self.word_embed = Dense(D, dtype=self.dtype, kernel_init=normal(std), dot_general=WHOLE)
    self.class_embedding = self.param('class_embedding', normal(std), (self.classes + 1, D), jnp.float32)
    self.level_embedding = self.param('level_embedding', normal(std), (len(self.pyramid), D), jnp.float32)
    self.position = self.param('position', normal(std), (self.pyramid.length, D), jnp.float32)
    self.start = self.param('start', normal(std), (self.pyramid.sizes[0], D), jnp.float32)
    if self.shared_adaln:
      self.shared = Dense(6 * D, dtype=self.dtype, kernel_init=normal(std), dot_general=ROWS)
    scanned = nn.scan(
        rematerialized(Block, self.remat, prevent_cse=False), variable_axes={'params': 0},
        split_rngs={'params': True}, length=self.depth, in_axes=(0, 0, nn.broadcast),
        unroll=self.depth if self.unroll else 1)
    self.blocks = scanned(
        D, self.heads or self.depth, self.mlp_ratio, self.normalize_qk, self.shared_adaln, std,
        std / math.sqrt(2 * self.depth), self.adaln_scale, self.adaln_gamma, self.pyramid, self.attention,
        self.dtype)
    self.head_adaln = Dense(
        2 * D, dtype=jnp.float32, kernel_init=normal(std * self.adaln_scale), dot_general=WHOLE)
    self.head = Dense(self.codes, dtype=jnp.float32, kernel_init=normal(std * self.head_scale), dot_general=COLUMNS)

  @property
  def residual_dtype(self):
    return jnp.float32 if self.float32_residual else self.dtype

  @property
  def init_std(self):
    return math.sqrt(1 / (3 * (self.width or 64 * self.depth)))

  def __call__(self, labels_B, teacher_BxMxC, keep_NxxB=None):
    """Teacher forcing: logits (B, L, V) float32 of all scales at once.

    teacher_BxMxC: `teacher_input` of the tokenizer, all scales but the first; keep_NxxB: (depth, 2, B) drop-path
    factors, see `drop_path_factors`.
    """
    chex.assert_shape(teacher_BxMxC, (None, self.pyramid.length - self.pyramid.sizes[0], self.channels))
    first_BxlxD = self._first(labels_B)
    x_BxLxD = jnp.concatenate([first_BxlxD, self.word_embed(teacher_BxMxC)], axis=1)
    x_BxLxD = constrain(self._placed(x_BxLxD, slice(0, self.pyramid.length)), BATCH)
    (x_BxLxD, _), _ = self.blocks((x_BxLxD, None), keep_NxxB, None, self._condition(labels_B))
    return self._logits(x_BxLxD, labels_B)

  def empty_cache(self, batch):
    """A `Cache` for so many pyramids; of a Markov pyramid, whose scales need no others, one that keeps nothing."""
    if self.pyramid.markov:
      return Cache(None, None, jnp.int32(0))
    D, H = self.width or 64 * self.depth, self.heads or self.depth
    zeros = jnp.zeros((self.depth, batch, self.pyramid.length, H, D // H), self.dtype)
    zeros = constrain(zeros, None, BATCH, None, TENSOR).reshape(*zeros.shape[:3], D)  # no head in parts
    return Cache(zeros, zeros, jnp.int32(0))

  def next_scale(self, labels_B, scale, input_BxlxC, cache):
    """Logits (B, l, V) of one scale, and the cache with its keys and values.

    input_BxlxC: the coarser scales' sum averaged down to this scale (None at the first); cache: what the call for the
    scale before returned, `empty_cache` at the first.
    """
    x_BxlxD = self._first(labels_B) if scale == 0 else self.word_embed(input_BxlxC)
    x_BxlxD = self._placed(x_BxlxD, self.pyramid.slices[scale])
    old, carry = cache.modulation, (x_BxlxD, cache.replace(modulation=None))
    (x_BxlxD, cache), new = self.blocks(carry, None, old, self._condition(labels_B))
    cache = cache.replace(
        layer=jnp.int32(0), length=self.pyramid.slices[scale].stop, modulation=new if old is None else old)
    return self._logits(x_BxlxD, labels_B), cache

  def _class(self, labels_B):
    return constrain(self.class_embedding[labels_B], BATCH)

  def _first(self, labels_B):
    class_BxD = self._class(labels_B)
    return (class_BxD[:, None] + self.start).astype(self.residual_dtype)

  def _placed(self, x_BxlxD, tokens):
    """What the first block takes: x and where each of these tokens lies."""
    level_lxD = self.level_embedding[self.pyramid.level_L[tokens]]
    return (x_BxlxD + (level_lxD + self.position[tokens])).astype(self.residual_dtype)

  def _condition(self, labels_B):
    class_BxD = self._class(labels_B).astype(self.dtype)
    if not self.shared_adaln:
      return class_BxD
    return self.shared(nn.silu(class_BxD)).reshape(labels_B.shape[0], 6, -1)

  def _logits(self, x_BxLxD, labels_B):
    adaln_Bx2D = constrain(self.head_adaln(nn.silu(self._class(labels_B))), BATCH)
    scale_BxD, shift_BxD = jnp.split(adaln_Bx2D, 2, axis=-1)
    logits = self.head(layer_norm(x_BxLxD) * (scale_BxD[:, None] + 1) + shift_BxD[:, None])
    return constrain(logits, BATCH, None, TENSOR)


def drop_path_factors(key, depth, batch, rate):
  """(depth, 2, batch) factors of the residual branches: 0 where dropped, else 1/(1-rate), rising linearly to `rate`."""
  rates_N = jnp.linspace(0, rate, depth)[:, None, None]
  kept = jax.random.bernoulli(key, 1 - rates_N, (depth, 2, batch))
  return kept / (1 - rates_N)
