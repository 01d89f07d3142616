"""Compiles the real train step and sampler for a TPU that is not there, and says whether they fit and what bounds them.

python launch/compile_check.py --config=experiments/imagenet256.py:generator,depth=16 --topology=v5e:4x4
Needs no accelerator, but `pip install -e '.[tpu]'`. Settings are changed as in training: --config.remat=dots
--config.accumulate=2; `--fit` tries about twice as many slices until they fit. Exit status 1 when nothing does: 90 %
of a chip's memory are to be enough. `--platform=cuda` lowers for GPUs instead, which shows that the program can be
built for them and no more.
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

  from var_jax.commands import script
  script.stop_at_once()

import json
import os
import re
import time
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # libtpu, where installed, would look for chips
# What is counted comes before machine code is written, which need not be good: a quarter of the time and more.
os.environ.setdefault('LIBTPU_INIT_ARGS', '--xla_jf_llo_level=1')

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from var_jax import flops
from var_jax import workdir as workdir_lib
from var_jax.commands import flags, script
from var_jax.commands.train import check_numbers
from var_jax.errors import UserError, first_line
from var_jax.generator import attention, sampling
from var_jax.stages.generator import GeneratorStage
from var_jax.stages.tokenizer import TokenizerStage
from var_jax.tokenizer import lpips
from var_jax.training import hlo, loop
from var_jax.training import mesh as mesh_lib

GIB = 2**30
USABLE = 0.9  # of a chip's memory


class Chip(NamedTuple):
  """FLOP/s in bfloat16, bytes of memory and their rate, bytes/s between chips (all links, one direction)."""

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


CHIPS = {  # as published by the maker; v4 with both cores as one device
    'v4': Chip(275e12, 32 * GIB, 1228e9, 150e9), 'v5e': Chip(197e12, 16 * GIB, 819e9, 100e9),
    'v5p': Chip(459e12, 95 * GIB, 2765e9, 300e9), 'v6e': Chip(918e12, 32 * GIB, 1640e9, 224e9)}


def main(arguments):
  parser = flags.Parser('launch/compile_check.py', __doc__, 'python launch/compile_check.py '
                        '--config=experiments/imagenet256.py:generator,depth=16 --topology=v5e:16x16')
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='as for training')
  parser.add_argument('--topology', default='v5e:4x4', metavar='CHIP:SHAPE', help='such as v5e:16x16, v4:2x2x4')
  parser.add_argument('--platform', choices=['tpu', 'cuda'], default='tpu')
  parser.add_argument('--program', choices=['train', 'sample'], default='train')
  parser.add_argument('--per_device', type=int, default=8, metavar='N', help='images for the sampler (default 8)')
  parser.add_argument('--fit', action='store_true', help='more and more config.accumulate, until the step fits')
  parser.add_argument('--json', action='store_true', help='one line of JSON in place of the table')
  options, overrides = parser.parse_known_args(arguments)
  flags.in_range('--per_device', options.per_device, 1)
  config = flags.read_config(options.config, overrides)
  check_numbers(config)
  if options.platform == 'cuda':
    lowered = program(config, options, jax.devices()[:1])[0].lower(lowering_platforms=('cuda',))
    print(f'lowered for cuda: {len(lowered.as_text().splitlines())} lines of StableHLO')
    return 0
  kind, _, shape = options.topology.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise UserError(f'--topology={options.topology} is none: give one of {", ".join(CHIPS)} and a shape, as in v5e:4x4')
  for config.accumulate in accumulations(config, options):
    found = check(config, options, CHIPS[kind])
    if found['fits']:
      break
  if options.json:
    told = {'config': options.config, 'topology': options.topology, 'program': options.program}
    print(json.dumps(told | {name: config[name] for name in ('accumulate', 'remat', 'dtype')} | found))
  else:
    show(found)
  return 0 if found['fits'] else 1


def devices_of(topology):
  """The devices of a topology that is not there. UserError for one that does not exist."""
  more = {'chip_config_name': 'megacore'} if topology.startswith('v4') else {}
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **more).devices
  except Exception as error:  # whatever libtpu raises, and its absence
    raise UserError(f'--topology={topology} cannot be had ({first_line(error)}): use one such as '
                    "v5e:4x4, and pip install -e '.[tpu]'") from error


def accumulations(config, options):
  """The config's `accumulate`, and with --fit larger ones that share the batch evenly, twice as large or so each."""
  found = [config.accumulate]
  if options.fit and options.program == 'train':
    parts = mesh_lib.batch_parts(mesh_lib.make_mesh(devices_of(options.topology), **config.mesh))
    for more in range(2 * config.accumulate, config.batch_size // parts + 1):
      found += [more] if config.batch_size % (parts * more) == 0 and more >= 2 * found[-1] else []
  return found


def program(config, options, devices):
  """(what `jax.jit` traced, ideal FLOPs of one call, images of one call, see `hlo.count` for its kernels)."""
  drawing = options.program == 'sample'
  mesh = mesh_lib.fitting(config.mesh, devices) if drawing else mesh_lib.make_mesh(devices, **config.mesh)
  stage, kernels = abstract_stage(config, options), {}
  mesh = mesh if drawing else mesh_lib.suited(mesh, jax.eval_shape(stage.init))
  if stage.name == 'generator':
    kernels = attention.kernel_flops(stage.generator.pyramid, stage.generator.width // stage.generator.heads)
  with jax.set_mesh(mesh):
    if drawing:
      return *sampler(stage, mesh, options.per_device), kernels
    mesh_lib.check_batch(config.batch_size, mesh, config.accumulate)
    state = jax.eval_shape(stage.init).replace(frozen=stage.frozen)
    state, B = mesh_lib.placed(state, mesh), config.batch_size
    place = mesh_lib.split(mesh)
    batch = {'image': jax.ShapeDtypeStruct((B, *stage.image_size, 3), jnp.uint8, sharding=place),
             'label': jax.ShapeDtypeStruct((B,), jnp.int32, sharding=place)}
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=mesh_lib.per_device(mesh))
    traced = loop.jitted_step(stage, state, mesh).trace(state, batch, stop)
    one = {name: jax.ShapeDtypeStruct((config.accumulate, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    return traced, B * flops.train_step(stage, state, one), B, kernels


def abstract_stage(config, options):
  """The stage of a config whose parameters are shapes; a generator gets the tokenizer of the same experiment."""
  steps = config.steps or 100_000
  if config.stage == 'tokenizer':
    params = lpips.shapes() if config.loss.lpips else None
    return TokenizerStage(config, workdir_lib.make_tokenizer(config), steps, lpips_params=params)
  config.model.classes = config.model.classes or 1000
  file = options.config.partition(':')[0]
  tokenizer = workdir_lib.make_tokenizer(flags.read_config(f'{file}:tokenizer', [f'--config.dtype={config.dtype}']))
  generator = workdir_lib.make_generator(config, tokenizer)
  guide = workdir_lib.generator_shapes(generator) if config.distill else None
  return GeneratorStage(config, generator, tokenizer, workdir_lib.tokenizer_shapes(tokenizer), '', steps, None, guide)


def sampler(stage, mesh, per_device):
  """As `program`, without kernels, of the sampler with guidance, top_k and top_p."""
  count = per_device * mesh_lib.batch_parts(mesh)
  params = {'generator': jax.eval_shape(stage.init).params, 'tokenizer': stage.frozen['tokenizer']}
  each = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=mesh_lib.split(mesh))

  def draw(params, labels_B, index_B):
    keys = sampling.image_keys(0, index_B)
    choices = sampling.Choices(**stage.config.sample)
    return sampling.sample(stage.generator, stage.tokenizer, params, labels_B.astype(jnp.int32), keys, choices)[:2]

  passes = 2 if stage.config.sample.cfg else 1
  ideal = flops.sample(stage.generator, stage.tokenizer, params['tokenizer'], passes)
  traced = jax.jit(draw, out_shardings=mesh_lib.split(mesh)).trace(mesh_lib.placed(params, mesh), each, each)
  return traced, count * ideal, count


def check(config, options, chip):
  """{name: number}, per chip, of the program compiled for a topology."""
  devices = devices_of(options.topology)
  start = time.monotonic()
  traced, ideal, images, kernels = program(config, options, devices)
  lowered = traced.lower(lowering_platforms=('tpu',))
  traced_in = time.monotonic() - start
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = re.search(r'(?:Used |HLO temporaries \()([\d.]+)G', str(error))
    return {'fits': False, 'needs_gib': float(used[1]) if used else None, 'why': ' '.join(str(error).split())[:200]}
  memory, cost, n = compiled.memory_analysis(), hlo.count(compiled.as_text(), kernels), len(devices)
  peak = memory.peak_memory_in_bytes
  times = {'compute': cost.flops / chip.flops, 'memory': cost.bytes / chip.memory_rate,
           'network': sum(cost.sent.values()) / chip.link_rate}
  bound = max(times, key=times.get)
  return {
      'fits': peak <= USABLE * chip.memory, 'chips': n, 'images': images, 'peak_gib': peak / GIB,
      'share_of_memory': peak / chip.memory, 'arguments_gib': memory.argument_size_in_bytes / GIB,
      'temporaries_gib': memory.temp_size_in_bytes / GIB, 'tflops': cost.flops / 1e12,
      'ideal_tflops': ideal / n / 1e12, 'over_ideal': cost.flops / (ideal / n), 'gib_moved': cost.bytes / GIB,
      **{f'{kind}_mib'.replace('-', '_'): size / 2**20 for kind, size in cost.sent.items()},
      'step_ms': 1e3 * times[bound], 'bound': bound, **{f'{name}_ms': 1e3 * t for name, t in times.items()},
      'mfu_ceiling': ideal / n / chip.flops / times[bound], 'trace_seconds': traced_in,
      'compile_seconds': time.monotonic() - start - traced_in}


def show(found):
  """Prints the figures, one a line."""
  for name, value in found.items():
    print(f'{name.replace("_", " "):24} {value if not isinstance(value, float) else format(value, ".4g")}')


if __name__ == '__main__':
  script.run(main)
