"""The axes of every mesh, and how activations lie on them: all that modules need to know of devices.

`data` and `fsdp` split batches, `fsdp` parameters as well, `tensor` heads and hidden units (see `training.mesh`).
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec

FSDP = 'fsdp'
BATCH = ('data', FSDP)
TENSOR = 'tensor'
NAMES = (*BATCH, TENSOR)


def constrain(x, *axes):
  """x, laid out over the mesh that is set: one of BATCH, TENSOR or None for each of its first dimensions.

  Dimensions that the axes cannot share evenly stay whole; without a mesh nothing happens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(kernel, axes):
  """A kernel that is kept in parts over `fsdp`, laid out as `constrain` does for a product: else XLA takes the product
  part by part and reads the activations each time. Its gradient goes back in parts, which halves what is sent.
  """
  return constrain(kernel, *axes)


def _gather(kernel, axes):
  return constrain(kernel, *axes), None


def _scatter(axes, _, gradient):
  return (constrain(gradient, *with_fsdp(gradient.shape, spec(gradient.shape, *axes), parts(FSDP))),)


gathered.defvjp(_gather, _scatter)


def with_fsdp(shape, axes, size, first=0):
  """The axes of a kernel's dimensions, with FSDP, of that size, along the largest from `first` on that is free."""
  found = [*axes, *[None] * (len(shape) - len(axes))]
  free = [i for i in range(first, len(shape)) if found[i] is None and shape[i] % size == 0]
  if size > 1 and free:
    found[max(free, key=lambda i: (shape[i], i))] = FSDP
  return found


def spec(shape, *axes):
  """The PartitionSpec of `constrain` for an array of this shape; all None without a mesh."""
  whole = lambda size, axis: parts(axis) == 1 or size % parts(axis)
  return PartitionSpec(*(None if whole(size, axis) else axis for size, axis in zip(shape, axes)))


def platform():
  """Of the devices of the mesh that is set, or else of those at hand: 'cpu', 'gpu' or 'tpu'."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def everywhere():
  """What `jax.jit` takes as out_shardings of results that every device, and so every process, is to have whole."""
  return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec()


def parts(axis):
  """Into how many parts the mesh that is set splits a dimension along an axis: BATCH, TENSOR or None."""
  mesh = jax.sharding.get_abstract_mesh()
  if axis is None or mesh.empty:
    return 1
  return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
