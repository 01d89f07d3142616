"""`var-jax tokenize`: a data set's token pyramids, so that a generator's training needs no encoder."""

import pathlib

import jax
import numpy as np

from var_jax import progress
from var_jax import workdir as workdir_lib
from var_jax.commands import flags
from var_jax.data import pipeline, tokens
from var_jax.data.sources import SPLITS, open_source

EXAMPLE = ('var-jax tokenize --config=experiments/digits.py:generator --workdir=runs/digits/tokenizer '
           '--out=runs/digits/tokens --crops=8\n  then: var-jax train --config=experiments/digits.py:generator '
           '--config.data.source=tokens --config.data.path=runs/digits/tokens …')


def main(arguments):
  parser = flags.Parser('tokenize', "Encodes an experiment's images, training and validation. Run it again to go on.",
                        EXAMPLE)
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='whose data is taken, as for training')
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--out', required=True, metavar='DIR', help='where the tokens are kept')
  parser.add_argument('--crops', type=int, default=1, metavar='N', help='random crops (and flips, where config.data '
                      'says so) of each training image, of which an epoch takes one at random (default 1)')
  parser.add_argument('--batch_size', type=int, default=64, metavar='N', help='crops encoded at a time (default 64)')
  parser.add_argument('--config.NAME', dest='unused', metavar='VALUE', help='such as --config.data.path=DIR')
  flags.add_distributed(parser)
  options, overrides = parser.parse_known_args(arguments)
  flags.in_range('--crops', options.crops, 1)
  flags.in_range('--batch_size', options.batch_size, 1)
  with flags.together(options):
    return run(flags.read_config(options.config, overrides), options)


def run(config, options):
  """Each process encodes files of its own, on its own devices."""
  from var_jax.model import Model
  from var_jax.training import mesh, processes

  sources = {split: open_source(config.data.source, config.data.path, split) for split in SPLITS}
  tokenizer, params = workdir_lib.load_tokenizer(options.workdir)
  made = {
      'tokenizer': workdir_lib.fingerprint(params), 'codes': tokenizer.codes, 'length': tokenizer.pyramid.length,
      'crops': options.crops, 'seed': config.seed, 'enlarge': config.data.enlarge, 'flip': config.data.flip,
      'classes': sources['train'].class_names, **{split: len(source) for split, source in sources.items()}}
  tokens.describe(options.out, made)
  model = Model(tokenizer, params, mesh=mesh.make_mesh(jax.local_devices()))
  work = [(split, i, pathlib.Path(options.out) / name) for split, source in sources.items()
          for i, name in enumerate(tokens.shard_names(split, len(source)))]
  mine = [item for item in work[jax.process_index()::jax.process_count()] if not item[2].exists()]
  bar = progress.bar(title='images', unit='image', show=processes.is_first(), total=sum(
      min(tokens.PER_SHARD, len(sources[split]) - i * tokens.PER_SHARD) for split, i, _ in mine))
  for split, i, path in mine:
    rows = encoded(model, sources[split], config, options, split, i * tokens.PER_SHARD)
    tokens.write_shard(path, _counted(rows, bar), tokenizer.codes)
  bar.close()
  if processes.is_first():
    print(f'{len(sources["train"])} images in {options.crops} crops, {len(sources["validation"])} to validate: '
          f'{options.out}')


def encoded(model, source, config, options, split, first):
  """(tokens (crops, L), label) of the images of one file, which begins with image number `first`."""
  crops, last = options.crops if split == 'train' else 1, min(first + tokens.PER_SHARD, len(source))
  batches = pipeline.crop_batches(
      source, batch_size=options.batch_size, size=model.tokenizer.image_size, seed=config.seed, first=first, last=last,
      crops=crops if split == 'train' else 0, enlarge=config.data.enlarge, flip=config.data.flip,
      workers=config.data.workers)
  waiting = []
  for batch in batches:
    waiting += zip(model.encode(batch['image'], batch_size=options.batch_size), batch['label'])
    while len(waiting) >= crops:
      yield np.stack([tokens_L for tokens_L, _ in waiting[:crops]]), waiting[0][1]
      waiting = waiting[crops:]


def _counted(rows, bar):
  for row in rows:
    yield row
    bar.update()
