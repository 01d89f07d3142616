"""`var-jax tokenize`: a data set's token pyramids, so that a generator's training needs no encoder."""

import contextlib
import pathlib

import jax
import numpy as np

from var_jax import lock, progress
from var_jax import workdir as workdir_lib
from var_jax.commands import flags, output
from var_jax.commands.train import check_numbers
from var_jax.data import pipeline, tokens
from var_jax.data.sources import SPLITS, identity, open_source
from var_jax.data.unreadable import Unreadable
from var_jax.errors import note

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

  check_numbers(config)
  sources = {split: open_source(config.data.source, config.data.path, split) for split in SPLITS}
  tokenizer, params = workdir_lib.load_tokenizer(options.workdir)
  output.make_folder(pathlib.Path(options.out))
  with lock.alone(options.out):
    if processes.is_first():
      tokens.describe(options.out, _made(config, options.crops, sources, tokenizer, params))
    processes.wait('described')
    missing = [item for item in files_of(sources, options.out) if not item[2].exists()]
    processes.wait('listed')
    model = Model(tokenizer, params, mesh=mesh.make_mesh(jax.local_devices()))
    write(model, sources, missing[jax.process_index()::jax.process_count()], config, options)
    processes.wait('tokenized')
  if processes.is_first():
    print(f'{len(sources["train"])} images in {options.crops} crops, {len(sources["validation"])} to validate: '
          f'{options.out}')


def _made(config, crops, sources, tokenizer, params):
  """How tokens are made, for `tokens.describe`. It reads of every image, so one process alone calls it."""
  return {
      'tokenizer': workdir_lib.fingerprint(params), 'codes': tokenizer.codes, 'scales': tokenizer.pyramid.scales,
      'crops': crops, 'seed': config.seed, 'enlarge': config.data.enlarge, 'flip': config.data.flip,
      'images': tokens.name_of(sources['train']),
      'data': [identity(source) for source in sources.values()], 'classes': sources['train'].class_names,
      **{split: len(source) for split, source in sources.items()}}


def files_of(sources, out):
  """[(split, range of its images, path)] of all files."""
  size = tokens.PER_SHARD
  return [(split, range(i * size, min((i + 1) * size, len(source))), pathlib.Path(out) / name)
          for split, source in sources.items() for i, name in enumerate(tokens.shard_names(split, len(source)))]


def write(model, sources, files, config, options):
  """Encodes the images of some files. UserError when too many cannot be read."""
  count, unreadable = sum(len(images) for _, images, _ in files), Unreadable()
  with progress.bar(title='images', unit='image', show=jax.process_index() == 0, total=count) as bar:
    for split, images, path in files:
      crops = options.crops if split == 'train' else 0
      with contextlib.closing(pipeline.crop_batches(
          sources[split], batch_size=options.batch_size, size=model.tokenizer.image_size, seed=config.seed,
          images=images, crops=crops, enlarge=config.data.enlarge, flip=config.data.flip,
          workers=config.data.workers, threads=config.data.threads, unreadable=unreadable)) as batches:
        tokens.write_shard(path, encoded(model, batches, max(crops, 1), bar), model.tokenizer.codes)
  if unreadable:
    note(f'{len(unreadable)} images could not be read; their neighbours took their places; the first: '
         f'{unreadable.first}')


def encoded(model, batches, crops, bar):
  """(tokens (crops, L), label) of each image, from batches of crops."""
  waiting = []
  for batch in batches:
    waiting += zip(model.encode(batch['image'], batch_size=len(batch['image'])), batch['label'])
    while len(waiting) >= crops:
      yield np.stack([tokens_L for tokens_L, _ in waiting[:crops]]), waiting[0][1]
      waiting = waiting[crops:]
      bar.update()
