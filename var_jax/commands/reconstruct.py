"""`var-jax reconstruct`: images through the tokenizer, and what every scale adds; whole folders; tokens to images."""

import collections
import pathlib

import numpy as np

from var_jax import pictures, progress
from var_jax.commands import flags, output
from var_jax.data.files import images_named
from var_jax.data.images import fit, read_image
from var_jax.data.sources import moved, open_source
from var_jax.data.spread import spread
from var_jax.errors import UserError

EXAMPLE = ('var-jax reconstruct --workdir=runs/photos/tokenizer --images=cat.jpg,dog.png --out=scales.png\n'
           '  var-jax reconstruct --workdir=runs/photos/tokenizer --images=photos --out=reconstructed\n'
           '  var-jax reconstruct --workdir=runs/photos/tokenizer --tokens=reconstructed/tokens.npz --out=again')
AT_A_TIME = 64
MOST_IN_A_PICTURE = 32  # images, each in two rows


def main(arguments):
  parser = flags.Parser(
      'reconstruct', 'Encodes images and decodes them after 1, 2, … scales. A picture shows the token maps as well.',
      EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--images', action='append', metavar='FILE|DIR,...', help='images or folders, which '
                      'are fitted to the size of the model; may be given several times')
  parser.add_argument('--held_out', type=int, metavar='N', help="or: N held-out images of the model's data, "
                      'spread over its classes')
  parser.add_argument('--data', metavar='[KIND:]PATH', help='where these are, when not in the place of its config')
  parser.add_argument('--tokens', metavar='X.npz', help='or: tokens (N,L) that reconstruct, sample or edit left')
  parser.add_argument('--out', required=True, metavar='X.png|X.npz|DIR', help='a picture; arrays: arr_0, tokens, '
                      'scales; or a folder: the last scale alone, and tokens.npz')
  options = parser.parse_args(arguments)
  flags.in_range('--held_out', options.held_out, 1)
  if sum(map(bool, (options.images, options.held_out, options.tokens))) != 1:
    raise UserError('say which images: one of --images=FILE,..., --held_out=N and --tokens=X.npz')
  tokens = _read_tokens(options.tokens) if options.tokens else None
  files = images_named(options.images) if options.images else None
  output.check(options.out, files or [options.tokens] if files or options.tokens else [])
  if options.data and not options.held_out:
    raise UserError("--data says where the model's images are: add --held_out=N to take some of them")

  from var_jax.model import load

  model = load(options.workdir)
  if not output.suffix(options.out):
    count = _to_folder(model, options, files, tokens)
    print(f'{count} images in {options.out}')
    return
  images = None if options.tokens else _images(options, files, model.tokenizer.image_size)
  count = len(images if tokens is None else tokens)
  as_picture = output.suffix(options.out) != '.npz'
  if as_picture and count > MOST_IN_A_PICTURE:
    raise UserError(f'{count} images are too many for one picture, which takes {MOST_IN_A_PICTURE}: use --out=X.npz or '
                    'a folder')
  tokens = model.encode(images) if tokens is None else tokens
  scales = model.decode_every_scale(tokens)
  picture = None
  if as_picture:
    picture = pictures.scales_figure(scales[:, -1] if images is None else images, tokens, scales,
                                     model.tokenizer.pyramid)
  output.save(options.out, scales[:, -1], picture, tokens=tokens, scales=scales)
  print(f'{len(tokens)} images after each of {scales.shape[1]} scales in {options.out}')


def _to_folder(model, options, files, tokens):
  """Writes reconstructions under their files' names, and all tokens, some images at a time. Returns their number."""
  size, parts = model.tokenizer.image_size, []
  if tokens is not None:
    names = pictures.names(len(tokens))
  elif files:
    names = _names(files)
  else:
    images = _images(options, None, size)
    names = pictures.names(len(images))
  output.check_folder(options.out, names)
  for start in progress.bar(range(0, len(names), AT_A_TIME), title='images', unit='batch'):
    some = slice(start, start + AT_A_TIME)
    if tokens is not None:
      parts.append(tokens[some])
    else:
      parts.append(model.encode(_read(files[some], size) if files else images[some]))
    output.save(options.out, model.decode(parts[-1]), None, names=names[some])
  output.save_arrays(f'{options.out}/tokens.npz', tokens=np.concatenate(parts), names=np.array(names))
  return len(names)


def _names(files):
  """A name for each file, all different: its stem, with its number where stems repeat."""
  stems = [pathlib.Path(file).stem for file in files]
  times = collections.Counter(stems)
  taken, names = {stem for stem in stems if times[stem] == 1}, []
  for i, stem in enumerate(stems):
    name = stem if times[stem] == 1 else f'{stem}_{i:06d}'
    while times[stem] > 1 and name in taken:
      name += '_'
    taken.add(name)
    names.append(name)
  return names


def _read(files, size):
  return np.stack([fit(read_image(file, size=size), size, enlarge=1) for file in files])


def _images(options, files, size):
  """(N, h, w, 3) uint8: the files that were named, or held-out images of the model's own data."""
  if files:
    return _read(files, size)
  from var_jax.workdir import read_config

  config = read_config(options.workdir)
  data = (moved(config, options.data) if options.data else config).data
  source = open_source(data.source, data.path, 'validation')
  return np.stack([fit(source[int(i)][0], size, enlarge=1) for i in spread(source, options.held_out)])


def _read_tokens(path):
  from var_jax.weights import read_tensors

  if not pathlib.Path(path).is_file():
    raise UserError(f'there is no {path}: give an .npz of tokens that reconstruct, sample or edit wrote')
  tokens = read_tensors(path).get('tokens') if path.lower().endswith('.npz') else None
  if tokens is None:
    raise UserError(f'{path} holds no tokens: give an .npz that reconstruct, sample or edit wrote')
  return tokens
