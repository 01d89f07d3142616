"""`var-jax edit`: in-painting, out-painting and class-conditional editing, by a box or a mask."""

import numpy as np

from var_jax import pictures
from var_jax.commands import flags, output
from var_jax.commands import labels as labels_lib
from var_jax.data.images import fit, read_image, read_mask
from var_jax.errors import UserError

EXAMPLE = ('var-jax edit --workdir=runs/d16 --image=dog.jpg --box=60,60,200,200 --mode=inpaint --label=207 '
           '--out=edited.png')


def main(arguments):
  parser = flags.Parser(
      'edit', 'Draws a part of an image anew and keeps the rest: tokens outside of that part stay as the image has '
      'them, at every scale but 1x1. With --label the new part is of that class, without it of none.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a generator's workdir")
  parser.add_argument('--image', required=True, metavar='FILE', help='fitted to the size of the model')
  parser.add_argument('--box', type=flags.numbers, metavar='y0,x0,y1,x1', help="in the image file's pixels, without "
                      'the row y1 and the column x1')
  parser.add_argument('--mask', metavar='FILE', help='or: a picture of the same size, white in place of the box')
  parser.add_argument('--mode', choices=['inpaint', 'outpaint'], default='inpaint',
                      help='inpaint draws the box (or white) anew, outpaint all else (default inpaint)')
  parser.add_argument('--label', metavar='L', help='class of the new part, a number or a name (default: none)')
  parser.add_argument('--paste', action='store_true', help='put the pixels that are kept back from the original, which '
                      'the decoder would change a little (default: off, as published)')
  parser.add_argument('--num', type=int, default=1, metavar='N', help='versions (default 1)')
  parser.add_argument('--seed', type=int, default=0, metavar='S')
  flags.add_choices(parser)
  parser.add_argument('--out', required=True, metavar='X.png|X.npz|DIR', help='a picture of the original, the '
                      'part that is drawn anew and the results; arrays, or a folder of the results')
  options = parser.parse_args(arguments)
  flags.in_range('--num', options.num, 1)
  flags.in_range('--seed', options.seed, 0, 2**32 - 1)
  image = read_image(options.image)
  inside = _inside(options, image.shape[:2])
  output.check(options.out, filter(None, [options.image, options.mask]))
  if not output.suffix(options.out):
    output.check_folder(options.out, pictures.names(options.num))
  labels = options.label and labels_lib.one_of_workdir(options.label, options.workdir) * options.num

  from var_jax.model import load

  model = load(options.workdir)
  if output.suffix(options.out) in output.PICTURES:
    output.check_sheet(options.out, options.num + 2, model.tokenizer.image_size, rows=1)
  image, inside = fit(image, model.tokenizer.image_size, enlarge=1), _fit_mask(inside, model.tokenizer.image_size)
  redraw = inside if options.mode == 'inpaint' else ~inside
  if not redraw.any() or redraw.all():
    raise UserError('within the part of the image that the model sees (its centre) there is nothing to '
                    f'{"draw anew" if not redraw.any() else "keep"}: choose another box or mask')
  edited = model.edit(np.repeat(image[None], options.num, 0), np.repeat(redraw[None], options.num, 0), labels,
                      options.seed, progress=True, **flags.choices(options))
  images = np.where(redraw[..., None], edited.images, image) if options.paste else edited.images
  picture = pictures.grid(np.stack([image, pictures.outlined(image, inside), *images])[None])
  output.save(options.out, images, picture, labels=edited.labels, tokens=edited.tokens)
  print(f'{options.num} edited image{"s" if options.num > 1 else ""} in {options.out}')


def _inside(options, size):
  """(H, W) bool at the image file's size: True in the box, or where the mask is white."""
  if bool(options.box) == bool(options.mask):
    raise UserError('say which part: either --box=y0,x0,y1,x1 or --mask=FILE')
  if options.mask:
    mask = read_mask(options.mask)
    if mask.shape != size:
      raise UserError(f'the mask {options.mask} has {mask.shape[0]}x{mask.shape[1]} pixels, the image {size[0]}x'
                      f'{size[1]}: give a mask of the same size')
    return mask
  if len(options.box) != 4:
    raise UserError(f'--box takes four numbers y0,x0,y1,x1, not {len(options.box)}')
  y0, x0, y1, x1 = options.box
  if not (0 <= y0 < y1 <= size[0] and 0 <= x0 < x1 <= size[1]):
    raise UserError(f'--box={y0},{x0},{y1},{x1} does not lie in the image of {size[0]}x{size[1]} pixels: give '
                    'y0,x0,y1,x1 with y0 < y1 and x0 < x1')
  inside = np.zeros(size, bool)
  inside[y0:y1, x0:x1] = True
  return inside


def _fit_mask(inside, size):
  """The mask cropped and resized as the image is."""
  return fit(np.repeat(np.uint8(inside)[..., None] * np.uint8(255), 3, axis=-1), size, enlarge=1)[..., 0] > 127
