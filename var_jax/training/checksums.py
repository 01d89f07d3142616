"""A number for each array, by which a checkpoint shows that it came back as it was: its files do not tell."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

NO_MESH = Mesh(np.empty((), object), ())  # where each part is computed on its own device


def of(tree):
  """{name: 32 bits that depend on every bit of the array}, computed where the arrays lie, whatever their sharding."""
  named, _ = jax.tree_util.tree_flatten_with_path(tree)
  parts, here = [], []
  with jax.set_mesh(NO_MESH):
    for _, leaf in named:
      on_device = isinstance(leaf, jax.Array)
      parts.append(_parts(leaf) if on_device else _slices(np.asarray(leaf)))
      here.append(not on_device or leaf.is_fully_addressable or leaf.is_fully_replicated)
  sums = np.array([sum(map(int, each)) % 2**32 for each in parts], np.uint32)
  if not all(here):  # one message between the processes: on CPUs they confuse many small ones
    sums = np.where(here, sums, multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): int(x) for (path, _), x in zip(named, sums)}


def check(tree, wanted):
  """Raises ValueError that names an array whose number is another than in `wanted`; {}: nothing is known of them."""
  for name, found in of(tree).items() if wanted else ():
    if wanted.get(name) != found:
      raise ValueError(f'{name} is not what was saved')


def _parts(x):
  """The sums of those parts of an array that this process has, copies left out; of what all have, of its own copy."""
  starts = lambda index: np.array([part.start or 0 for part in index], np.uint32)
  first = x.addressable_shards[:1]
  parts = first if x.is_fully_replicated else [shard for shard in x.addressable_shards if not shard.replica_id]
  return [_sum(shard.data, starts(shard.index), _strides(x)) for shard in parts]


def _slices(x):
  """The sums of some slices of an array of this process, one after the other: it may be half as large as the memory."""
  if not x.ndim:
    return [_sum(x, np.zeros(0, np.uint32), _strides(x))]
  step = max(1, -(-len(x) // 32))
  starts = (np.array([start] + [0] * (x.ndim - 1), np.uint32) for start in range(0, len(x), step))
  return [int(_sum(x[int(start[0]):][:step], start, _strides(x))) for start in starts]


def _strides(x):
  return np.array([np.prod(x.shape[axis + 1:], dtype=np.int64) % 2**32 for axis in range(x.ndim)], np.uint32)


@jax.jit
def _sum(x, starts, strides):
  """Sum over the words of a mixture of word and place, modulo 2^32: one that changes alone always changes the sum.

  The place is that in the whole array in row-major order, of which x begins at `starts`.
  """
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
  for axis in range(x.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + starts[axis]
    words += place * strides[axis] * np.uint32(0x9E3779B9)
  return jnp.sum(_mixed(words), dtype=jnp.uint32)


def _mixed(x):
  """The finalizer of MurmurHash3: a one-to-one map of 32 bits in which every input bit reaches every output bit."""
  x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
  x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
  return x ^ x >> 16
