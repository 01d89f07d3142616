"""`var-jax export`: artifacts that run without var_jax, and parameters alone."""

import pathlib
import shutil

from var_jax.commands import flags, output
from var_jax.errors import UserError

EXAMPLE = ('var-jax export --workdir=runs/digits/generator --out=digits --platforms=cpu,cuda,tpu\n'
           '  python launch/run_artifact.py digits --labels=0,3,7 --out=digits.npz')


def main(arguments):
  parser = flags.Parser(
      'export', 'Writes sample.jaxexport, encode.jaxexport and decode.jaxexport (any batch size; jax alone runs them, '
      'see launch/run_artifact.py), about.json, and params/, an orbax checkpoint of the parameters alone.', EXAMPLE)
  parser.add_argument('--workdir', required=True, metavar='DIR', help="a tokenizer's or a generator's workdir")
  parser.add_argument('--out', required=True, metavar='DIR', help='an empty or a new folder')
  parser.add_argument('--platforms', default='cpu,cuda,tpu', metavar='cpu,cuda,tpu', help='where they shall run')
  parser.add_argument('--weights', choices=['inside', 'beside'], default='inside',
                      help='of the artifacts; beside: once, in weights.npz (default inside)')
  parser.add_argument('--raw', action='store_true', help='the parameters themselves where a run keeps an average (EMA)')
  flags.add_choices(parser, cfg=False)
  options = parser.parse_args(arguments)
  out = pathlib.Path(options.out)
  platforms = list(dict.fromkeys(name.strip() for name in options.platforms.split(',')))  # each once, in order

  from var_jax.generator.sampling import Choices
  from var_jax.interop import artifacts
  from var_jax.model import check_choices, load
  from var_jax.training.checkpoint import save_params

  for name in platforms:
    if name not in artifacts.PLATFORMS:
      raise UserError(f'there is no platform {name!r}: use some of {", ".join(artifacts.PLATFORMS)}')
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'--out={out} is there already: name an empty or a new folder')
  choices = Choices(**flags.choices(options))
  check_choices(*choices[:4])
  model = load(options.workdir, raw=options.raw)
  output.make_folder(out)
  try:
    written = artifacts.write(model, out, platforms, choices, options.weights == 'inside')
    save_params(out / 'params', model.params)
  except BaseException:  # a half-written export is of no use, and in the way of the next one
    for path in out.iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise
  for path in (*written, out / 'params'):
    print(path)
