"""The device mesh, and where arrays live on it: batches are split over its `data` axis, all else is replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from var_jax.errors import UserError


def make_mesh(devices=None):
  """A mesh over all devices (of all processes) with the axis `data`."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def split(mesh):
  """Sharding of a batch: its first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch(batch_size, mesh, accumulate=1):
  """Raises UserError when the devices cannot share a batch evenly."""
  parts = mesh.size * accumulate
  if batch_size % parts:
    near = max(batch_size // parts, 1) * parts
    raise UserError(
        f'batch_size {batch_size} cannot be shared by {mesh.size} devices with accumulate={accumulate}: '
        f'use a multiple of {parts}, such as {near}')


def put_batch(batch, mesh):
  """Each process's rows {name: (B/processes, ...)} as global arrays (B, ...) split over the mesh."""
  return {name: jax.make_array_from_process_local_data(split(mesh), np.asarray(x)) for name, x in batch.items()}


def put_state(state, mesh):
  """A host-local pytree as one that is replicated over the mesh."""
  return jax.device_put(state, replicated(mesh))
