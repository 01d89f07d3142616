"""`var-jax sample`: images of the classes asked for, as one picture, an .npz or a folder."""

import pathlib

import numpy as np

from var_jax import pictures
from var_jax.commands import flags, output

EXAMPLE = 'var-jax sample --workdir=runs/digits/generator --labels=0,3,7 --num=9 --cfg=1.5 --out=digits.png'


def main(arguments):
  parser = flags.Parser('sample', 'Draws images. Image i depends on the seed, i and its label alone.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a generator's workdir")
  parser.add_argument('--labels', type=flags.numbers, metavar='0,3,7', help='classes, in turn (default: all)')
  parser.add_argument('--num', type=int, metavar='N', help='images in all (default: one a label)')
  parser.add_argument('--seed', type=int, default=0, metavar='S')
  flags.add_choices(parser)
  parser.add_argument('--batch_size', type=int, default=64, metavar='N', help='images drawn at a time (default 64)')
  parser.add_argument('--out', required=True, metavar='X.png|X.npz|DIR', help='one picture, arrays, or a folder')
  options = parser.parse_args(arguments)
  output.check(options.out)
  flags.in_range('--num', options.num, 1)
  flags.in_range('--batch_size', options.batch_size, 1)
  flags.in_range('--seed', options.seed, 0, 2**32 - 1)

  from var_jax.model import load

  model = load(options.workdir)
  labels = options.labels or list(range(model.generator.classes if model.generator else 1))
  labels = np.resize(labels, options.num or len(labels))
  samples = model.sample(
      labels, options.seed, batch_size=options.batch_size, progress=True, **flags.choices(options))
  columns = min(len(options.labels or labels), len(labels))  # labels come in turn: a column each
  picture = pictures.sheet(samples.images, columns if columns <= 20 else 0)
  output.save(options.out, samples.images, picture, labels=samples.labels, tokens=samples.tokens)
  print(f'{len(labels)} images in {pathlib.Path(options.out)}')
