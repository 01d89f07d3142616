"""`var-jax sample`: images of the classes asked for, as one picture, an .npz or a folder."""

import pathlib

import numpy as np

from var_jax import pictures
from var_jax.commands import flags, output
from var_jax.commands import labels as labels_lib
from var_jax.errors import UserError
from var_jax.training import processes

EXAMPLE = 'var-jax sample --workdir=runs/digits/generator --labels=0,3,7 --num=9 --cfg=1.5 --out=digits.png'
MOST_ROWS = 20  # or columns: more classes fill a square


def main(arguments):
  parser = flags.Parser('sample', 'Draws images. Image i depends on the seed, i and its label alone.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a generator's workdir")
  parser.add_argument('--labels', metavar='cat,7,0-9', help='classes, in turn (default: all): '
                      f'numbers, {labels_lib.WAYS}')
  parser.add_argument('--num', type=int, metavar='N', help='images in all (default: one a label)')
  parser.add_argument('--seed', type=int, default=0, metavar='S')
  flags.add_choices(parser)
  parser.add_argument('--best_of', type=int, default=1, metavar='R', help='keep the one of R candidates for each image '
                      'that --classifier is surest of')
  parser.add_argument('--classifier', metavar='F.jaxexport', help='images (b, H, W, 3) uint8 -> logits (b, classes), '
                      'such as the judge.jaxexport that evaluate leaves in a workdir')
  parser.add_argument('--batch_size', type=int, default=64, metavar='N', help='images drawn at a time (default 64)')
  parser.add_argument('--low_memory', action='store_true', help='decode image after image')
  parser.add_argument('--bfloat16', action='store_true', help="keep the generator's kernels in bfloat16: half of their "
                      'memory, slightly other images')
  parser.add_argument('--out', required=True, metavar='X.png|X.npz|DIR', help='one picture, with a row for '
                      'each label; arrays; or a folder, of which the same call draws what is missing')
  flags.add_distributed(parser)
  options = parser.parse_args(arguments)
  flags.in_range('--num', options.num, 1)
  flags.in_range('--batch_size', options.batch_size, 1)
  flags.in_range('--seed', options.seed, 0, 2**32 - 1)
  flags.in_range('--best_of', options.best_of, 1)
  if (options.best_of > 1) != bool(options.classifier):
    raise UserError('--best_of=R and --classifier=F.jaxexport go together: give both, R being 2 or more')
  with flags.together(options):
    if processes.is_first():
      output.check(options.out)
    run(options)


def run(options):
  """Draws and writes what the flags say; of several processes the first writes."""
  from var_jax.evaluation.drawing import draw, draw_to_folder
  from var_jax.evaluation.rejection import Rejecting
  from var_jax.model import load

  asked = labels_lib.of_workdir(options.labels or 'all', options.workdir)
  model = load(options.workdir, low_memory=options.low_memory, bfloat16=options.bfloat16)
  if options.classifier:
    model = Rejecting(model, options.classifier, options.best_of)
  first = processes.is_first()
  labels = np.resize(asked, options.num or len(asked))
  out, choices = pathlib.Path(options.out), flags.choices(options)
  if output.suffix(out) == '.npz':
    draw(model, labels, options.seed, out, choices, options.batch_size)
  elif output.suffix(out):
    rows = _rows(len(asked), len(labels))
    output.check_sheet(out, len(labels), model.tokenizer.image_size, rows)
    images = model.sample(labels, options.seed, batch_size=options.batch_size, progress=first, **choices).images
    if first:
      output.save(out, images, pictures.sheet(images, rows))
  else:
    draw_to_folder(model, labels, options.seed, out, choices, options.batch_size)
  if first:
    print(f'{len(labels)} images in {out}')


def _rows(asked, count):
  """Rows of the picture: one for each label that was asked for, or for all images where they have one each; 0: any."""
  rows = asked if count > asked else 1
  return rows if max(rows, min(count, asked)) <= MOST_ROWS else 0
