"""Times every program that matters on this machine, as a share of what its matrix products reach in the same run.

python launch/benchmark.py --out=runs/benchmark.json            # all rows, with networks of the published sizes
python launch/benchmark.py --out=runs/new.json --only="sample d16" --against=runs/benchmark.json
A row: median seconds of a call, images/s, FLOP/s that the model needs (formulas in var_jax/flops.py, no masked pair
counted), their share of a float32 product of 2048x2048 matrices measured around the row, memory and compile time.
Rows of input: images/s of the pipeline, and their share of what Pillow alone makes of the same files. Rows of training:
images/s of the loop with its input, and the share of its time that its compiled step alone does not take.
Parameters are random: nothing has to be trained. --profile=DIR leaves a trace of one call of each row, --plot=X.png
shows the time of a sample against resolution and batch.
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

  from var_jax.commands import script
  script.stop_at_once()
  script.with_huge_pages()

import contextlib
import functools
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import benchmark_input
import benchmark_loop
import benchmark_show
import jax
import jax.numpy as jnp
import numpy as np

from var_jax import flops, progress
from var_jax import workdir as workdir_lib
from var_jax.commands import flags, output, script
from var_jax.errors import UserError
from var_jax.generator import sampling
from var_jax.stages.generator import GeneratorStage
from var_jax.stages.tokenizer import TokenizerStage

SMALL, DIGITS = 'experiments/imagenet256.py', 'experiments/digits.py'
PRODUCT = 2048  # side of the square matrices
SCALES = {128: (1, 2, 3, 4, 5, 6, 8), 256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


class Program(NamedTuple):
  """What a row times: a jitted function, its arguments, images of a call and ideal FLOPs of one.

  carries: whether a call's first result is the next one's first argument, as a training step's state is.
  """

  function: Any
  arguments: tuple
  images: int
  flops: float
  carries: bool = False


def main(arguments):
  parser = flags.Parser('launch/benchmark.py', __doc__, 'python launch/benchmark.py --out=runs/benchmark.json')
  parser.add_argument('--out', required=True, metavar='FILE.json', help='where figures go, beside those it has')
  parser.add_argument('--only', metavar='TEXT', help='the row of this name, or rows whose name has this text')
  parser.add_argument('--against', metavar='FILE.json', help='an earlier --out, or one of benchmark_torch.py')
  parser.add_argument('--repeats', type=int, default=5, metavar='N', help='calls; their median counts (default 5)')
  parser.add_argument('--profile', metavar='DIR', help='traces for TensorBoard or Perfetto')
  parser.add_argument('--plot', metavar='X.png', help='a picture of what --out has, once it is measured')
  options = parser.parse_args(arguments)
  flags.in_range('--repeats', options.repeats, 1)
  rows, old = chosen(options.only, ROWS), benchmark_show.read(options.against)
  if options.against and not old.keys() & set(rows):
    raise UserError(f'--against={options.against} has none of the rows to measure: it has {"; ".join(old)}')
  path, found = benchmark_show.begun(options.out, benchmark_show.OURS)
  if options.plot:
    if not options.plot.endswith('.png'):
      raise UserError(f'--plot={options.plot}: the picture is a PNG, give a name that ends in .png')
    benchmark_show.check_plotted({*rows, *found})
    output.make_folder(pathlib.Path(options.plot).parent, '--plot')
  if options.profile:
    output.make_folder(pathlib.Path(options.profile), '--profile')
  for name in progress.bar(rows, title='benchmark', unit='row'):
    made = ROWS[name]()
    if isinstance(made, Program):
      made = functools.partial(measured, made, trace=options.profile and f'{options.profile}/{name}')
    found[name] = made(options.repeats)
    output.save_text(path, json.dumps(found, indent=1) + '\n')
  print(benchmark_show.table({name: found[name] for name in rows}, old))
  if options.plot:
    tokens = {size: sum(side**2 for side in scales) for size, scales in SCALES.items()}
    benchmark_show.plot(found, options.plot, tokens)


def chosen(only, rows):
  """The names of rows that --only asks for."""
  names = [only] if only in rows else [name for name in rows if (only or '') in name]
  if not names:
    raise UserError(f'--only={only} is in no row: they are {"; ".join(rows)}')
  return names


def measured(program, repeats, trace=None):
  """{name: number} of one program; the machine's rate is taken before and after each call."""
  start = time.monotonic()
  compiled = program.function.lower(*program.arguments).compile()
  compile_seconds, memory = time.monotonic() - start, compiled.memory_analysis()
  state, *rest = program.arguments

  def call():
    nonlocal state
    out = jax.block_until_ready(compiled(state, *rest))
    state = out[0] if program.carries else state

  found = rates(call, multiplier(), program.images, program.flops, repeats, trace)
  return found | {
      'compile_seconds': compile_seconds, 'arguments_mib': memory.argument_size_in_bytes / 2**20,
      'temporaries_mib': memory.temp_size_in_bytes / 2**20,
      'output_mib': (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20}


def rates(call, multiply, images, flops_of_image, repeats, trace=None, by=benchmark_show.OURS):
  """{name: figure} of a call that makes so many images, between calls of `multiply`, a product of PRODUCT matrices."""
  seconds, products = [], [product_rate(multiply)]
  for i in range(repeats + 1):  # the first one warms up
    with jax.profiler.trace(str(trace)) if trace and i == repeats else contextlib.nullcontext():
      took = benchmark_input.timed(call)
    seconds += [took] if i else []
    products.append(product_rate(multiply))
  rate, median, operations = statistics.median(products), statistics.median(seconds), images * flops_of_image
  return {
      'seconds': median, 'images_per_second': images / median, 'gflops': operations / 1e9,
      'gflops_per_second': operations / median / 1e9, 'product_gflops_per_second': rate / 1e9,
      'share_of_product': operations / median / rate, 'machine': machine(), 'by': by}


@functools.cache
def multiplier():
  """A function that multiplies two matrices, and waits."""
  matrix = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
  compiled = jax.jit(lambda a: a @ a).lower(matrix).compile()
  compiled(matrix).block_until_ready()
  return lambda: compiled(matrix).block_until_ready()


def product_rate(multiply):
  """FLOP/s of a float32 matrix product, the best of three."""
  return 2 * PRODUCT**3 / min(benchmark_input.timed(multiply) for _ in range(3))


def machine():
  device = jax.devices()[0]
  name = device.device_kind
  with contextlib.suppress(OSError):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines() if device.platform == 'cpu' else []
    names = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
    name = f'{len(names)} cores of {names[0]}' if names else name
  return name


def filled(shapes, scale=0.02):
  """Random parameters of these shapes."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape, np.float32)), shapes)


@functools.cache
def tokenizer_of(file, size=None):
  """(config, Tokenizer, parameters); size: of images, one of SCALES, where it is not the experiment's."""
  # Without the perceptual loss, whose weights are not ours to give.
  more = ['--config.dtype=float32', '--config.remat=none', '--config.loss.lpips=0']
  if size:
    more += [f'--config.image_size=({size},{size})', f'--config.model.scales={SCALES[size]}']
  config = flags.read_config(f'{file}:tokenizer', more)
  tokenizer = workdir_lib.make_tokenizer(config)
  return config, tokenizer, filled(workdir_lib.tokenizer_shapes(tokenizer))


@functools.cache
def generator_of(file, depth, size=None):
  """(config, Generator, Tokenizer, {'generator', 'tokenizer'}: parameters)."""
  more = [] if file == DIGITS else [f'--config.model.depth={depth}', '--config.model.classes=1000']
  config = flags.read_config(f'{file}:generator', ['--config.dtype=float32', '--config.remat=none', *more])
  config.model.classes = config.model.classes or 10
  _, tokenizer, params = tokenizer_of(file, size)
  generator = workdir_lib.make_generator(config, tokenizer)
  params = {'generator': filled(workdir_lib.generator_shapes(generator)), 'tokenizer': params}
  return config, generator, tokenizer, params


def images_of(tokenizer, batch):
  rng = np.random.default_rng(0)
  return {'image': jnp.asarray(rng.uniform(-1, 1, (batch, *tokenizer.image_size, 3)), jnp.float32),
          'label': jnp.asarray(rng.integers(0, 10, batch), jnp.int32)}


def tokens_of(tokenizer, batch):
  return jax.random.randint(jax.random.key(0), (batch, tokenizer.pyramid.length), 0, tokenizer.codes)


def encode(batch, file=SMALL):
  _, tokenizer, params = tokenizer_of(file)
  apply = lambda params, x: tokenizer.apply({'params': params}, x, method='encode')
  image = images_of(tokenizer, batch)['image']
  return Program(jax.jit(apply), (params, image), batch, flops.counted(apply, params, image[:1]))


def decode(batch, file=SMALL):
  _, tokenizer, params = tokenizer_of(file)
  apply = lambda params, x: tokenizer.apply({'params': params}, x, method='decode')
  tokens = tokens_of(tokenizer, batch)
  return Program(jax.jit(apply), (params, tokens), batch, flops.counted(apply, params, tokens[:1]))


def sample(depth, batch, cfg=1.5, file=SMALL, size=None):
  config, generator, tokenizer, params = generator_of(file, depth, size)
  choices = sampling.Choices(**config.sample)._replace(cfg=cfg)

  def draw(params, labels_B):
    keys_B = sampling.image_keys(0, jnp.arange(batch))
    return sampling.sample(generator, tokenizer, params, labels_B, keys_B, choices)[:2]

  ideal = flops.sample(generator, tokenizer, params['tokenizer'], passes=2 if cfg else 1)
  return Program(jax.jit(draw), (params, jnp.zeros(batch, jnp.int32)), batch, ideal)


def step(stage, batch, data):
  state = jax.jit(stage.init)().replace(frozen=jax.tree.map(jnp.copy, stage.frozen))  # it is donated
  one = {name: x[:1] for name, x in data.items()}
  jitted = jax.jit(stage.train_step, donate_argnums=0)
  return Program(jitted, (state, data), batch, flops.train_step(stage, state, one), carries=True)


def generator_step(depth, batch, file=SMALL):
  """On tokens: the encoder's time is a row of its own."""
  config, generator, tokenizer, params = generator_of(file, depth)
  stage = GeneratorStage(config, generator, tokenizer, params['tokenizer'], '', 1000)
  return step(stage, batch, {'tokens': tokens_of(tokenizer, batch), 'label': jnp.zeros(batch, jnp.int32)})


def tokenizer_step(batch, file=SMALL):
  """Without the perceptual loss, see `tokenizer_of`."""
  config, tokenizer, _ = tokenizer_of(file)
  return step(TokenizerStage(config, tokenizer, 1000), batch, images_of(tokenizer, batch))


def generator_loop(repeats):
  config, generator, tokenizer, params = generator_of(DIGITS, 0)
  encoder = lambda: jax.tree.map(jnp.copy, params['tokenizer'])  # it is donated
  stage = lambda config, steps: GeneratorStage(config, generator, tokenizer, encoder(), '', steps)
  return benchmark_loop.rates(stage, config, repeats)


def tokenizer_loop(repeats):
  config, tokenizer, _ = tokenizer_of(DIGITS)
  return benchmark_loop.rates(lambda config, steps: TokenizerStage(config, tokenizer, steps), config, repeats)


ROWS = {
    'encode, batch 4': lambda: encode(4),
    'decode, batch 1': lambda: decode(1),
    'decode, batch 4': lambda: decode(4),
    **{f'sample d16, batch {batch}{text}': functools.partial(sample, 16, batch, cfg)
       for batch in (1, 4, 16) for cfg, text in ((1.5, ''), (0.0, ', no guidance'))},
    **{f'sample d16, batch 1, {size} px': functools.partial(sample, 16, 1, size=size) for size in (128, 512)},
    'generator step d8, batch 4': lambda: generator_step(8, 4),
    'tokenizer step, batch 1': lambda: tokenizer_step(1),
    'digits: generator step, batch 64': lambda: generator_step(0, 64, DIGITS),
    'digits: tokenizer step, batch 64': lambda: tokenizer_step(64, DIGITS),
    'digits: sample, batch 64': lambda: sample(0, 64, file=DIGITS),
    'digits: generator training': lambda: generator_loop,
    'digits: tokenizer training': lambda: tokenizer_loop,
    'input, 2 threads': lambda: functools.partial(benchmark_input.rates, 0),
    'input, 2 processes': lambda: functools.partial(benchmark_input.rates, 2),
}


if __name__ == '__main__':
  script.run(main)
