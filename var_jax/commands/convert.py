"""`var-jax convert`: published PyTorch checkpoints into a workdir, and a workdir into published checkpoints."""

import argparse
import pathlib

from var_jax.commands import flags, output
from var_jax.errors import UserError

EXAMPLE = ('var-jax convert --tokenizer=vae_ch160v4096z32.pth --generator=var_d16.pth --workdir=runs/d16\n'
           '  var-jax convert --workdir=runs/d16 --to_torch=published')


def main(arguments):
  parser = flags.Parser(
      'convert', 'Published checkpoints (.pth needs torch; .safetensors) to a workdir that every command takes, and '
      'back. The architecture is read from names and shapes.', EXAMPLE)
  parser.add_argument('--tokenizer', metavar='FILE', help='the VQVAE, such as vae_ch160v4096z32.pth')
  parser.add_argument('--generator', metavar='FILE', help='the VAR transformer, such as var_d16.pth; without it the '
                      "workdir is a tokenizer's")
  parser.add_argument('--workdir', required=True, metavar='DIR', help='to write, or to read with --to_torch')
  parser.add_argument('--patch_nums', type=_scales, metavar='1,2,3', help='scales where the token count is not a '
                      'published one; 2x3 for a height of 2 and a width of 3')
  parser.add_argument('--heads', type=int, default=0, metavar='N', help='where the queries have no learned scale '
                      '(default: width/64)')
  parser.add_argument('--to_torch', metavar='DIR', help='write the workdir as vae.pth and var.pth (without torch as '
                      '.safetensors), which the published code loads with strict=True')
  options = parser.parse_args(arguments)
  if options.to_torch:
    _to_torch(options)
  else:
    _from_torch(options)


def _scales(text):
  try:
    sizes = [[int(side) for side in part.split('x')] for part in text.split(',')]
  except ValueError:
    sizes = []
  if not sizes or any(len(size) > 2 for size in sizes):
    raise argparse.ArgumentTypeError(f'{text!r} is no list of scales such as 1,2,3 or 1x1,2x3')
  return tuple(size[0] if len(size) == 1 else tuple(size) for size in sizes)


def _from_torch(options):
  if not options.tokenizer:
    raise UserError('name the files: --tokenizer=vae.pth, and --generator=var.pth for a generator')
  flags.in_range('--heads', options.heads, 0)
  if options.heads and not options.generator:
    raise UserError('--heads is the generator\'s: add --generator=var.pth, or leave it out')
  workdir = pathlib.Path(options.workdir)
  if workdir.exists() and any(workdir.iterdir() if workdir.is_dir() else [workdir]):
    raise UserError(f'{workdir} is there already: choose another --workdir')

  from var_jax.interop import checkpoints

  checkpoints.write_workdir(workdir, options.tokenizer, options.generator, options.patch_nums, options.heads)
  print(f'{workdir} holds {checkpoints.describe(workdir)}')


def _to_torch(options):
  for name in ('tokenizer', 'generator', 'patch_nums', 'heads'):
    if getattr(options, name):
      raise UserError(f'--{name} has no use beside --to_torch, which reads the workdir: leave it out')
  out = pathlib.Path(options.to_torch)
  if out.is_file():
    raise UserError(f'--to_torch={out} is a file: name a folder')
  for name in ('vae.pth', 'var.pth', 'vae.safetensors', 'var.safetensors', 'vae.json'):
    if (out / name).exists():
      raise UserError(f'{out / name} is there already: name another folder')

  from var_jax.interop import checkpoints
  from var_jax.workdir import read_config

  read_config(options.workdir)
  output.make_folder(out, '--to_torch')
  for path in checkpoints.write_published(options.workdir, out):
    print(path)
