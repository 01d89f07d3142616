"""The device mesh, and where arrays live on it, in a handful of rules.

Batches are split over `data` and `fsdp`. Of the parameters, and of all that is shaped like them (optimizer, average),
some are split over `tensor` by TENSOR_RULES, and kernels over `fsdp` along the largest dimension that it divides, or
along two by parts of it (see `suited`); tables and vectors, a small part, are replicated, and so are networks that are
not trained (FROZEN), which have neither gradients nor moments. XLA derives the collectives.
"""

import collections
import itertools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from var_jax import axes
from var_jax.errors import UserError

# Names of the transformer's parameters, and the dimension along which `tensor` splits them.
TENSOR_RULES = (
    (r'(qkv/kernel|q_bias|v_bias|log_scale|fc1/kernel|fc1/bias|head/kernel|head/bias)$', -1),
    (r'(attention/proj/kernel|fc2/kernel|adaln/kernel|shared/kernel)$', -2),
)
FROZEN = re.compile(r'^(tokenizer|lpips)/')  # of `stage.frozen`, and of what a workdir's model is made of
STACKED = re.compile(r'(^|/)blocks/')  # the first dimension counts blocks, which are taken one at a time


def make_mesh(devices=None, *, data=-1, fsdp=1, tensor=1):
  """A mesh over devices (default: all, of all processes); -1 takes what the other axes leave.

  data=0 is the number of slices, of TPUs or GPUs, between which only the slower network lies. UserError when the sizes
  do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(data=_slices(devices) if data == 0 else data, fsdp=fsdp, tensor=tensor)
  open_axes, fixed = [name for name in sizes if sizes[name] == -1], math.prod(s for s in sizes.values() if s != -1)
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'mesh sizes are {sizes}: make them 1 or more, and no more than one of them -1, for the rest')
  if len(devices) % fixed or not open_axes and fixed != len(devices):
    largest = max((name for name in sizes if sizes[name] != -1), key=sizes.get)
    better = f'{largest}={math.gcd(sizes[largest], len(devices))}' if open_axes else 'data=-1'
    raise UserError(f'a mesh of {_described(sizes)} does not fit {len(devices)} devices: change config.mesh, such as '
                    f'--config.mesh.{better}')
  shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
  return Mesh(_arranged(devices, shape), axes.NAMES, axis_types=(AxisType.Auto,) * 3)


def _described(sizes):
  return ' x '.join(f'{size} {name}' for name, size in sizes.items())


def _slices(devices):
  return len({getattr(device, 'slice_index', None) for device in devices})


def _arranged(devices, shape):
  """Devices in an array so that neighbours are linked well; only `data` reaches over slices."""
  slices = _slices(devices)
  if slices > 1:
    if shape[0] % slices:
      raise UserError(f'the mesh\'s data axis, {shape[0]}, is not shared evenly by {slices} slices: make it a '
                      f'multiple, such as --config.mesh.data={slices}')
    return mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), (slices, 1, 1), devices)
  if devices[0].platform == 'tpu':
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return np.array(devices).reshape(shape)  # in order of processes: the last axes stay within one as far as they fit


def fitting(sizes, devices=None):
  """A mesh for inference: the sizes of a run as far as this many devices allow."""
  devices = jax.devices() if devices is None else devices
  fsdp = math.gcd(max(sizes.fsdp, 1), len(devices))
  return make_mesh(devices, fsdp=fsdp, tensor=math.gcd(max(sizes.tensor, 1), len(devices) // fsdp))


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def split(mesh):
  """Sharding of a batch: its first axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(axes.names(axes.BATCH, mesh)))


def batch_parts(mesh):
  """How many parts a batch is split into."""
  return mesh.size // mesh.shape['tensor']


def spec_of(name, shape, mesh):
  """PartitionSpec of a parameter 'blocks/attention/qkv/kernel', or of a moment or average of the same shape."""
  spec, first = [None] * len(shape), 1 if STACKED.search(name) else 0
  if FROZEN.search(name):
    return PartitionSpec(*spec)
  for pattern, axis in TENSOR_RULES:
    if re.search(pattern, name) and len(shape) >= -axis and shape[axis] % mesh.shape['tensor'] == 0:
      spec[axis] = axes.TENSOR if mesh.shape['tensor'] > 1 else None
  free = [i for i in range(first, len(shape)) if spec[i] is None]
  if mesh.shape['fsdp'] > 1 and name.endswith('kernel'):
    for i, part in _by_fsdp(shape, sorted(free, key=lambda i: (shape[i], i), reverse=True), mesh):
      spec[i] = part
  return PartitionSpec(*spec)


def _by_fsdp(shape, free, mesh):
  """[(dimension, axes)] that split a kernel over `fsdp`: one of the free dimensions, first ones first, or two."""
  parts, rest = mesh.shape['fsdp'], mesh.shape.get(axes.FSDP_REST, 1)
  fits = lambda i, count: shape[i] % count == 0
  one = [(i, 'fsdp' if rest == 1 else ('fsdp', axes.FSDP_REST)) for i in free if fits(i, parts * rest)]
  if one or rest == 1:
    return one[:1]
  two = [[(i, 'fsdp'), (j, axes.FSDP_REST)] for i, j in itertools.permutations(free, 2)
         if fits(i, parts) and fits(j, rest)]
  some = [[(i, axis)] for count, axis in sorted([(parts, 'fsdp'), (rest, axes.FSDP_REST)], reverse=True)
          for i in free if fits(i, count)]
  return [*two, *some, []][0]


def suited(mesh, state):
  """A mesh whose `fsdp` axis is made of two where devices can share more of a state's arrays (or shapes) that way.

  As a width of 1920 by 256 devices: no dimension of its square kernels is a multiple of 256, but one is of 128, the
  other of 2. The devices keep their order, so batches lie as before.
  """
  data, fsdp, tensor = mesh.shape.values()
  halves = [rest for rest in range(2, fsdp) if fsdp % rest == 0]
  made_of_two = lambda rest: Mesh(
      mesh.devices.reshape(data, fsdp // rest, rest, tensor), (*axes.BATCH, axes.FSDP_REST, axes.TENSOR),
      axis_types=(AxisType.Auto,) * 4)
  return min([mesh, *map(made_of_two, halves)], key=lambda mesh: sum(_bytes(x) for x in _leaves(state, mesh).values()))


def _leaves(state, mesh):
  """{path: shape with its sharding} of a pytree."""
  return dict(jax.tree_util.tree_flatten_with_path(placed(state, mesh))[0])


def _bytes(x):
  """That one device has of an array."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def undivided(state, mesh):
  """A line on what `fsdp` leaves whole, or in fewer parts than there are devices; None where nothing is to be split."""
  fsdp, total, sizes = batch_parts(mesh) // mesh.shape['data'], set(), collections.Counter()
  for path, x in _leaves(state, mesh).items():
    name = _name(path)
    if name and x.ndim and not FROZEN.search(name):
      total.add(name)
      spec = jax.tree.leaves(tuple(x.sharding.spec))
      if fsdp > math.prod(mesh.shape[axis] for axis in spec if axis != axes.TENSOR):
        sizes[name] += _bytes(x)
  if fsdp == 1 or not sizes:
    return None
  named = ', '.join(name for name, _ in sizes.most_common(3)) + (', …' if len(sizes) > 3 else '')
  return (f'fsdp: {len(sizes)} of {len(total)} parameters are not shared by all {fsdp} devices: '
          f'{sum(sizes.values()) / 2**20:.3g} MiB on each, with moments and average ({named})')


def shardings(tree, mesh):
  """NamedShardings of a pytree of arrays or of their shapes, by the names of its dicts' keys."""

  def of(path, leaf):
    return NamedSharding(mesh, spec_of(_name(path), leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(of, tree)


def _name(path):
  return '/'.join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def placed(shapes, mesh):
  """A pytree's shapes with their shardings: where a checkpoint, or a compiled step, is to have them."""
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes,
                      shardings(shapes, mesh))


def check_batch(batch_size, mesh, accumulate=1):
  """Raises UserError when the devices cannot share a batch evenly."""
  parts = batch_parts(mesh) * accumulate
  if batch_size % parts:
    near = max(batch_size // parts, 1) * parts
    raise UserError(
        f'batch_size {batch_size} cannot be shared by {batch_parts(mesh)} devices with accumulate={accumulate}: '
        f'use a multiple of {parts}, such as {near}')


def process_part(mesh, batch_size):
  """(index, count): which part of a batch of this size this process reads, of how many.

  Processes whose devices differ along `tensor` alone read the same part.
  """
  rows = [index[0].indices(batch_size)[:2] for index in
          split(mesh).addressable_devices_indices_map((batch_size,)).values()]
  first, end = min(start for start, _ in rows), max(stop for _, stop in rows)
  return first // (end - first), batch_size // (end - first)


def put_batch(batch, mesh):
  """Each process's part {name: (B/parts, ...)}, see `process_part`, as global arrays (B, ...) split over the mesh."""
  return {name: jax.make_array_from_process_local_data(split(mesh), np.asarray(x)) for name, x in batch.items()}


def put_whole(x, mesh):
  """An array (B, ...) that every process has whole, as a global one that is split over the mesh."""
  return jax.make_array_from_callback(x.shape, split(mesh), lambda index: x[index])


def per_device(mesh):
  """Sharding of an array with one row for each device."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def put_number(number, mesh):
  """Each process's own number, as a global array of one for each device."""
  return jax.make_array_from_callback((mesh.size,), per_device(mesh), lambda index: np.full(1, number, np.int32))


def put_state(state, mesh):
  """A pytree, global or the same on every process, laid out by the rules."""

  def put(x, place):
    if jax.process_count() == 1 or isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, place)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  return jax.tree.map(put, state, shardings(state, mesh))
