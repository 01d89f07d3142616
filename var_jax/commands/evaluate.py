"""`var-jax evaluate`: a workdir's model against the held-out images of its own data; writes JSON."""

import json
import pathlib

from var_jax.commands import flags, output
from var_jax.errors import UserError

EXAMPLE = 'var-jax evaluate --workdir=runs/digits/generator --features=classifier --out=judged.json'


def main(arguments):
  parser = flags.Parser(
      'evaluate', "A tokenizer: PSNR and codebook usage per scale on held-out images. A generator: how many samples a "
      'classifier, trained on the real images in about a minute, judges as the class asked for.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--features', default='classifier', choices=['classifier'],
                      help='classifier: trained on the training images')
  parser.add_argument('--per_class', type=int, default=50, metavar='N', help='samples of each class (default 50)')
  parser.add_argument('--seed', type=int, default=0, metavar='S')
  flags.add_choices(parser)
  parser.add_argument('--out', metavar='X.json', help='default: evaluation.json in the workdir')
  options = parser.parse_args(arguments)
  flags.in_range('--per_class', options.per_class, 1)
  flags.in_range('--seed', options.seed, 0, 2**32 - 1)
  out = pathlib.Path(options.out or pathlib.Path(options.workdir) / 'evaluation.json')
  if out.suffix != '.json':
    raise UserError(f'--out={out} must end in .json')

  from var_jax import workdir
  from var_jax.evaluation import classes, reconstruction
  from var_jax.model import load

  model, config = load(options.workdir), workdir.read_config(options.workdir)
  if model.generator is None:
    figures = reconstruction.figures(model, config)
  else:
    figures = classes.figures(
        model, config, options.per_class, options.seed, flags.choices(options))
  output.make_folder(out.parent)
  out.write_text(json.dumps(figures, indent=2) + '\n')
  for name, value in figures.items():
    print(f'{name:32} {value:.4g}' if isinstance(value, float) else f'{name:32} {value}')
  print(f'written to {out}')
