"""Times the published networks in PyTorch on this machine, for `benchmark.py --against`.

python launch/benchmark_torch.py --out=runs/torch.json
python launch/benchmark.py --out=runs/benchmark.json --against=runs/torch.json
Rows have the names, sizes and formulas of launch/benchmark.py, and their share is one of PyTorch's own product of
2048x2048 matrices. Convolutions are in the faster of its two layouts (channels last), AdamW is fused, pages are huge;
torch.compile is left out. Needs PyTorch: pip install 'var_jax[torch]'
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

  from var_jax.commands import script
  script.stop_at_once()
  script.with_huge_pages()

import functools
import json

import benchmark
import jax
import numpy as np

from var_jax import flops, progress
from var_jax.commands import flags, output, script
from var_jax.errors import UserError
from var_jax.interop import published

try:
  import torch
except ModuleNotFoundError:
  torch = None
else:
  import torch_networks


def main(arguments):
  parser = flags.Parser('launch/benchmark_torch.py', __doc__, 'python launch/benchmark_torch.py --out=runs/torch.json')
  parser.add_argument('--out', required=True, metavar='FILE.json', help='where figures go, beside those it has')
  parser.add_argument('--only', metavar='TEXT', help='the row of this name, or rows whose name has this text')
  parser.add_argument('--repeats', type=int, default=5, metavar='N', help='calls; their median counts (default 5)')
  options = parser.parse_args(arguments)
  flags.in_range('--repeats', options.repeats, 1)
  if torch is None:
    raise UserError("this times PyTorch, which is not installed: pip install 'var_jax[torch]'")
  if jax.default_backend() != 'cpu':
    raise UserError('PyTorch is timed on the CPU alone: set JAX_PLATFORMS=cpu for both')
  rows, by = benchmark.chosen(options.only, ROWS), f'PyTorch {torch.__version__}'
  path, found = benchmark.benchmark_show.begun(options.out, by)
  matrix = torch.randn(benchmark.PRODUCT, benchmark.PRODUCT)
  for name in progress.bar(rows, title='benchmark', unit='row'):
    call, images, operations = ROWS[name]()
    found[name] = benchmark.rates(call, lambda: matrix @ matrix, images, operations, options.repeats, by=by)
    output.save_text(path, json.dumps(found, indent=1) + '\n')
  print(benchmark.benchmark_show.table({name: found[name] for name in rows}, {}))


def tensors(params, names):
  """Ours in the published layouts, convolutions' kernels with their channels last in memory."""
  made = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in published.to_published(params, names).items()}
  return {name: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for name, x in made.items()}


def tokenizer_with_tensors(file):
  """(Tokenizer, its tensors)."""
  _, tokenizer, params = benchmark.tokenizer_of(file)
  return tokenizer, tensors(params, published.tokenizer_names(params))


def encode(batch, file=benchmark.SMALL):
  tokenizer, w = tokenizer_with_tensors(file)
  image = torch.tensor(np.asarray(benchmark.images_of(tokenizer, batch)['image'])).permute(0, 3, 1, 2)
  program = benchmark.encode(batch, file)
  return torch.inference_mode()(lambda: torch_networks.encode(w, image, tokenizer.pyramid)), batch, program.flops


def decode(batch, file=benchmark.SMALL):
  tokenizer, w = tokenizer_with_tensors(file)
  tokens = torch.tensor(np.asarray(benchmark.tokens_of(tokenizer, batch))).split(tokenizer.pyramid.sizes, dim=1)
  program = benchmark.decode(batch, file)
  return torch.inference_mode()(lambda: torch_networks.decode(w, tokens, tokenizer.pyramid)), batch, program.flops


def sample(depth, batch, file=benchmark.SMALL):
  config, generator, tokenizer, params = benchmark.generator_of(file, depth)
  w = tensors(params['generator'], published.generator_names(params['generator'])) | tokenizer_with_tensors(file)[1]
  labels = torch.zeros(batch, dtype=torch.int64)
  draw = functools.partial(torch_networks.sample, w, labels, tokenizer.pyramid, 1.5, config.sample.top_k,
                           config.sample.top_p)
  return torch.inference_mode()(draw), batch, flops.sample(generator, tokenizer, params['tokenizer'])


def generator_step(depth, batch, file=benchmark.SMALL):
  config, generator, tokenizer, params = benchmark.generator_of(file, depth)
  w = tensors(params['generator'], published.generator_names(params['generator']))
  w = {name: x.requires_grad_() for name, x in w.items()}
  optimizer = torch.optim.AdamW(w.values(), lr=1e-4, betas=tuple(config.optimizer.betas), fused=True)
  tokens = torch.tensor(np.asarray(benchmark.tokens_of(tokenizer, batch)), dtype=torch.int64)
  teacher = torch.randn(batch, generator.pyramid.length - 1, generator.channels)
  labels = torch.zeros(batch, dtype=torch.int64)

  def step():
    logits = torch_networks.logits(w, labels, teacher, tokenizer.pyramid)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(w.values(), config.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()

  return step, batch, benchmark.generator_step(depth, batch, file).flops


ROWS = {
    'encode, batch 4': lambda: encode(4),
    'decode, batch 1': lambda: decode(1),
    'decode, batch 4': lambda: decode(4),
    **{f'sample d16, batch {batch}': functools.partial(sample, 16, batch) for batch in (1, 4, 16)},
    'generator step d8, batch 4': lambda: generator_step(8, 4),
}


if __name__ == '__main__':
  script.run(main)
