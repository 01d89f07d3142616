"""`var-jax reconstruct`: images through the tokenizer, and what every scale adds."""

import pathlib

import numpy as np

from var_jax import pictures
from var_jax.commands import flags, output
from var_jax.data.images import fit, read_image
from var_jax.errors import UserError

EXAMPLE = 'var-jax reconstruct --workdir=runs/photos/tokenizer --images=cat.jpg,dog.png --out=scales.png'


def main(arguments):
  parser = flags.Parser(
      'reconstruct', 'Encodes images and decodes them after 1, 2, … scales. A picture shows the token maps as well.',
      EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--images', metavar='FILE,...', help='images; fitted to the size of the model')
  parser.add_argument('--held_out', type=int, metavar='N', help="or: the first N validation images of the model's data")
  parser.add_argument('--out', required=True, metavar='X.png|X.npz', help='a picture, or arrays: arr_0, tokens, scales')
  options = parser.parse_args(arguments)
  flags.in_range('--held_out', options.held_out, 1)
  if bool(options.images) == bool(options.held_out):
    raise UserError('say which images: either --images=FILE,... or --held_out=N')
  if not pathlib.Path(options.out).suffix:
    raise UserError(f'--out={options.out} must be a picture such as X.png, or X.npz')
  output.check(options.out)

  from var_jax.model import load

  model = load(options.workdir)
  images = _images(options, model.tokenizer.image_size)
  tokens = model.encode(images)
  scales = model.decode_every_scale(tokens)
  if options.out.endswith('.npz'):
    picture = None
  else:
    picture = pictures.scales_figure(images, tokens, scales, model.tokenizer.pyramid)
  output.save(options.out, scales[:, -1], picture, tokens=tokens, scales=scales)
  print(f'{len(images)} images after each of {scales.shape[1]} scales in {options.out}')


def _images(options, size):
  """(N, h, w, 3) uint8: the files that were named, or the first held-out images of the model's own data."""
  if options.images:
    return np.stack([fit(read_image(file, size=size), size, enlarge=1) for file in options.images.split(',')])
  from var_jax.data.sources import open_source
  from var_jax.workdir import read_config

  data = read_config(options.workdir).data
  source = open_source(data.source, data.path, 'validation')
  return np.stack([fit(source[i][0], size, enlarge=1) for i in range(min(options.held_out, len(source)))])
