"""The axes of every mesh, and how activations lie on them: all that modules need to know of devices.

`data` and `fsdp` split batches, `fsdp` parameters as well, `tensor` heads and hidden units (see `training.mesh`).
"""

import math

import jax
from jax.sharding import PartitionSpec

BATCH = ('data', 'fsdp')
TENSOR = 'tensor'
NAMES = (*BATCH, TENSOR)


def constrain(x, *axes):
  """x, laid out over the mesh that is set: one of BATCH, TENSOR or None for each of its first dimensions.

  Dimensions that the axes cannot share evenly stay whole; without a mesh nothing happens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  whole = lambda size, axis: axis is None or size % _parts(mesh, axis)
  spec = [None if whole(size, axis) else axis for size, axis in zip(x.shape, axes)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def everywhere():
  """What `jax.jit` takes as out_shardings of results that every device, and so every process, is to have whole."""
  return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec()


def _parts(mesh, axis):
  return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
