"""A number for each array, by which a checkpoint shows that it came back as it was: its files do not tell."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

NO_MESH = Mesh(np.empty((), object), ())  # where each part is computed on its own device
PIECE = 2**18  # words of an array on the host that are summed at a time: one program serves arrays of all shapes


def of(tree):
  """{name: 32 bits that depend on every bit of the array}, computed where the arrays lie, whatever their sharding."""
  named, _ = jax.tree_util.tree_flatten_with_path(tree)
  parts, here = [], []
  with jax.set_mesh(NO_MESH):
    for _, leaf in named:
      parts.append(list(_pieces(np.asarray(leaf))) if _on_host(leaf) else _parts(leaf))
      here.append(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated)
  sums = np.array([sum(map(int, each)) % 2**32 for each in parts], np.uint32)
  if not all(here):  # one message between the processes: on CPUs they confuse many small ones
    sums = np.where(here, sums, multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): int(x) for (path, _), x in zip(named, sums)}


def check(tree, wanted):
  """Raises ValueError that names an array whose number is another than in `wanted`; {}: nothing is known of them."""
  for name, found in of(tree).items() if wanted else ():
    if wanted.get(name) != found:
      raise ValueError(f'{name} is not what was saved')


def _on_host(leaf):
  if not isinstance(leaf, jax.Array):
    return True
  return leaf.is_fully_addressable and [device.platform for device in leaf.devices()] == ['cpu']


def _parts(x):
  """The sums of those parts of an array that this process has, copies left out; of what all have, of its own copy."""
  starts = lambda index: np.array([part.start or 0 for part in index], np.uint32)
  first = x.addressable_shards[:1]
  parts = first if x.is_fully_replicated else [shard for shard in x.addressable_shards if not shard.replica_id]
  return [_sum(shard.data, starts(shard.index), _strides(x)) for shard in parts]


def _pieces(x):
  """The sums of the pieces of an array of this process."""
  x = np.ascontiguousarray(x, jax.dtypes.canonicalize_dtype(x.dtype)).reshape(-1)
  words = x.view(f'uint{8 * x.dtype.itemsize}')
  for start in range(0, len(words), PIECE):
    piece = words[start:start + PIECE].astype(np.uint32, copy=False)
    yield _sum_of_piece(np.resize(piece, PIECE), np.uint32(start % 2**32), len(piece))


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


@jax.jit
def _sum_of_piece(words, start, count):
  """As `_sum`, of the first `count` words of a piece that begins at a place of the whole array."""
  place = jnp.arange(PIECE, dtype=jnp.uint32)
  mixed = _mixed(words + (place + start) * np.uint32(0x9E3779B9))
  return jnp.sum(jnp.where(place < count, mixed, 0), dtype=jnp.uint32)


def _mixed(x):
  """The finalizer of MurmurHash3: a one-to-one map of 32 bits in which every input bit reaches every output bit."""
  x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
  x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
  return x ^ x >> 16
