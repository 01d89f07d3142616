"""The axes of every mesh, and how activations lie on them: all that modules need to know of devices.

`data` and `fsdp` split batches, `fsdp` parameters as well, `tensor` heads and hidden units (see `training.mesh`). Where
no dimension of some kernels can be split by all of `fsdp`, that axis is made of two, the second of which is FSDP_REST.
"""

import math

import jax
from jax.sharding import PartitionSpec

BATCH = ('data', 'fsdp')
TENSOR = 'tensor'
NAMES = (*BATCH, TENSOR)
FSDP_REST = 'fsdp_rest'
CPU_CACHE = 2**24  # bytes that a CPU is to work on at a time


def constrain(x, *axes):
  """x, laid out over the mesh that is set: one of BATCH, TENSOR or None for each of its first dimensions.

  Dimensions that the axes cannot share evenly stay whole; without a mesh nothing happens.
  """
  if devices() == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def spec(shape, *axes):
  """The PartitionSpec of `constrain` for an array of this shape; all None without a mesh."""
  whole = lambda size, axis: parts(axis) == 1 or size % parts(axis)
  mesh = jax.sharding.get_abstract_mesh()
  return PartitionSpec(*(None if whole(size, axis) else names(axis, mesh) for size, axis in zip(shape, axes)))


def names(axis, mesh):
  """The axes of a mesh that BATCH or TENSOR stands for."""
  return (*axis, FSDP_REST) if axis == BATCH and FSDP_REST in mesh.shape else axis


def platform():
  """Of the devices of the mesh that is set, or else of those at hand: 'cpu', 'gpu' or 'tpu'."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def devices():
  """How many devices the mesh that is set has; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size


def one_cpu():
  """Whether all runs on one CPU, whose cache is what counts: several are there to try what is for other devices."""
  return devices() == 1 and platform() == 'cpu'


def for_one_cpu(x):
  """Whether what is traced with x runs on one CPU: exported, its batch may be a symbol, and the device any."""
  return one_cpu() and isinstance(x.shape[0], int)


def everywhere():
  """What `jax.jit` takes as out_shardings of results that every device, and so every process, is to have whole."""
  return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec()


def parts(axis):
  """Into how many parts the mesh that is set splits a dimension along an axis: BATCH, TENSOR or None."""
  mesh = jax.sharding.get_abstract_mesh()
  if axis is None or mesh.empty:
    return 1
  return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else names(axis, mesh)))
