"""`var-jax reconstruct`: images through the tokenizer, and what every scale adds."""

import numpy as np

from var_jax import pictures
from var_jax.commands import flags, output
from var_jax.data.images import fit, read_image

EXAMPLE = 'var-jax reconstruct --workdir=runs/photos/tokenizer --images=cat.jpg,dog.png --out=scales.png'


def main(arguments):
  parser = flags.Parser(
      'reconstruct', 'Encodes images and decodes them: a row each, the image and then after 1, 2, … scales.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--images', required=True, metavar='FILE,...', help='images; fitted to the size of the model')
  parser.add_argument('--out', required=True, metavar='X.png|X.npz', help='a picture, or arrays: arr_0, tokens, scales')
  options = parser.parse_args(arguments)
  output.check(options.out)

  from var_jax.model import load

  model = load(options.workdir)
  size = model.tokenizer.image_size
  images = np.stack([fit(read_image(file, size=size), size, enlarge=1) for file in options.images.split(',')])
  tokens = model.encode(images)
  scales = model.decode_every_scale(tokens)
  rows = pictures.grid(np.concatenate([images[:, None], scales], axis=1))
  output.save(options.out, scales[:, -1], rows, tokens=tokens, scales=scales)
  print(f'{len(images)} images after each of {scales.shape[1]} scales in {options.out}')
