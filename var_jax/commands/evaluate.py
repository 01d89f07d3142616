"""`var-jax evaluate`: a workdir's model, or samples at hand, against real images; prints and writes JSON."""

import json
import os
import pathlib
import sys

from var_jax import paths
from var_jax.commands import flags, output
from var_jax.errors import UserError, note
from var_jax.training import processes
from var_jax.workdir import read_config

EXAMPLE = ('var-jax evaluate --workdir=runs/digits/generator --features=classifier --out=judged.json\n'
           '  var-jax evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --features=inception '
           '--weights=pt_inception-2015-12-05-6726825d.pth')


def main(arguments):
  parser = flags.Parser(
      'evaluate', 'Samples, or those that a generator draws, against real images: fid, sfid, inception_score, '
      'precision and recall with the FID Inception; or a classifier that is trained on the real images in about a '
      "minute. A generator's loss, and a tokenizer's PSNR, SSIM and codebook usage, on held-out images.", EXAMPLE)
  parser.add_argument('--workdir', metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--samples', metavar='X.npz|DIR', help='images to evaluate in place of what a generator draws')
  parser.add_argument('--reference', metavar='X.npz|DIR', help='real images, or statistics (mu, sigma, mu_s, sigma_s); '
                      "default: the training images of the workdir's data")
  parser.add_argument('--data', metavar='[KIND:]PATH', help="where the workdir's images are, when not in its config's "
                      'place; KIND: folder, arrays or tfds')
  parser.add_argument('--features', choices=['inception', 'classifier'],
                      help='default: inception with --weights, classifier without')
  parser.add_argument('--weights', metavar='FILE', help="the FID Inception, pytorch-fid's .pth or as .safetensors")
  parser.add_argument('--resize', choices=['tf1', 'half_pixel'], default='tf1',
                      help="of images for the Inception: as the published figures' evaluator (default) or pytorch-fid")
  parser.add_argument('--lpips_weights', metavar='FILE,...', help="for a tokenizer's LPIPS: torchvision's VGG-16 and "
                      'its heads, such as vgg16-397923af.pth,vgg.pth')
  parser.add_argument('--per_class', type=int, default=50, metavar='N', help='samples of each class (default 50)')
  parser.add_argument('--seed', type=int, default=0, metavar='S')
  parser.add_argument('--batch_size', type=int, default=64, metavar='N', help='images at a time (default 64)')
  flags.add_choices(parser)
  parser.add_argument('--grid', metavar='"cfg=1,2;top_p=0.9,0.96"', help='compare all combinations; a plot lies beside '
                      'the JSON')
  parser.add_argument('--out', metavar='X.json', help='default: evaluation.json in the workdir or beside the samples')
  flags.add_distributed(parser)
  options = parser.parse_args(arguments)
  with flags.together(options):
    run(options, _checked(options, arguments))


def run(options, out):
  """Evaluates what the flags say, and prints and writes it; of several processes the first does."""
  from var_jax.evaluation import grid
  from var_jax.evaluation.run import Request, figures_of

  names = ('workdir', 'samples', 'reference', 'data', 'weights', 'resize', 'per_class', 'seed', 'batch_size')
  lpips_weights = tuple(paths.split(options.lpips_weights)) if options.lpips_weights else ()
  points = tuple(grid.parse(options.grid)) if options.grid else ()

  def done(figures):
    if not processes.is_first():
      return
    text = json.dumps(figures, indent=2)
    print(text)
    output.save_text(out, text + '\n')
    print(f'written to {out}', file=sys.stderr)
    if points:
      print(grid.table(points, figures['grid']), file=sys.stderr)
      grid.plot(out.with_suffix('.png'), points, figures['grid'])

  figures_of(Request(
      **{name: getattr(options, name) for name in names}, folder=_folder(options, out), lpips_weights=lpips_weights,
      inception=options.features == 'inception', choices=flags.choices(options), grid=points), done)


def _folder(options, out):
  """Where samples, judge, statistics and the report are kept: the workdir, or beside the JSON when it is read-only."""
  if not options.workdir or os.access(options.workdir, os.W_OK):
    return options.workdir
  note(f'{options.workdir} cannot be written to: samples, judge and report go to {out.parent}')
  return str(out.parent)


DRAWING = ('cfg', 'top_k', 'top_p', 'temperature', 'smooth', 'per_class', 'seed', 'grid')


def _note_useless(options, given):
  """Says which of the flags that were given are ignored. UserError for a grid, which would be all that was asked."""
  useless = {}
  if options.samples:
    useless |= dict.fromkeys(('lpips_weights', *DRAWING), '--samples are there already')
  elif read_config(options.workdir).stage == 'tokenizer':
    useless |= dict.fromkeys(('reference', *DRAWING), f'{options.workdir} holds a tokenizer')
  else:
    useless['lpips_weights'] = f'{options.workdir} holds a generator'
  if options.features == 'classifier':
    useless |= dict.fromkeys(('weights', 'resize'), 'the features are a classifier\'s')
  for name in given:
    if name in useless and name != 'grid':
      note(f'--{name} has no use here, for {useless[name]}')
    elif name in useless:
      raise UserError(f'--grid draws its samples itself, but {useless[name]}: give the --workdir of a generator alone')


def _checked(options, arguments):
  """The path of the JSON file. UserError for flags that do not go together, before anything is computed."""
  for flag in ('per_class', 'batch_size'):
    flags.in_range(f'--{flag}', getattr(options, flag), 1)
  flags.in_range('--seed', options.seed, 0, 2**32 - 1)
  if not options.workdir and not options.samples:
    raise UserError('say what to evaluate: --workdir=DIR, or --samples=X.npz with --reference=Y.npz')
  options.features = options.features or ('inception' if options.weights else 'classifier')
  if options.features == 'inception' and not options.weights:
    raise UserError('--features=inception needs the weights of the FID Inception: add --weights=FILE '
                    '(pt_inception-2015-12-05-6726825d.pth of pytorch-fid), or use --features=classifier')
  if not options.workdir and options.features == 'classifier':
    raise UserError("--features=classifier is trained on a workdir's data: add --workdir=DIR, or use "
                    '--features=inception --weights=FILE')
  if not options.workdir and not options.reference:
    raise UserError('--samples are compared with real images: add --reference=X.npz, a folder, or --workdir=DIR')
  if options.data and not options.workdir:
    raise UserError("--data says where a workdir's images are: add --workdir=DIR")
  if options.features == 'classifier' and options.reference:
    raise UserError("--features=classifier compares with the workdir's data alone: leave --reference out")
  samples = pathlib.Path(options.samples or 'samples')
  default = pathlib.Path(options.workdir or samples.parent) / 'evaluation.json'
  out = pathlib.Path(options.out or default)
  if out.suffix != '.json':
    raise UserError(f'--out={out} must end in .json')
  _note_useless(options, flags.given(arguments))
  if processes.is_first():
    output.make_folder(out.parent)
  return out
