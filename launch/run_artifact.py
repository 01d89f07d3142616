"""Runs what `var-jax export` wrote, with jax and numpy alone: no var_jax.

python launch/run_artifact.py FOLDER --labels=0,3,7 --seed=0 --cfg=1.5 --out=images.npz
"""

import argparse
import json
import os
import pathlib
import sys

for stream in (sys.stdout, sys.stderr):
  stream.reconfigure(errors='backslashreplace')  # for file names that a terminal cannot show
try:
  import jax
  import numpy as np
  from jax import export
except ImportError as error:
  sys.exit(print(f'error: {error}: run this with the Python of an environment that has jax, such as '
                 '.venv/bin/python', file=sys.stderr) or 2)


def place(text):
  """A path of this machine, ~ being the home."""
  if '://' in text:
    raise argparse.ArgumentTypeError(f'{text} is an address: give a path of this machine')
  return pathlib.Path(os.path.expanduser(text))


parser = argparse.ArgumentParser(description='Draws images with an exported sampler.')
parser.add_argument('folder', type=place)
parser.add_argument('--labels', default='0', help='classes, such as 0,3,7')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--cfg', type=float, default=1.5)
parser.add_argument('--out', default='images.npz', type=place)


def require(good, message):
  """Ends the program with exit status 2 unless all is good."""
  if not good:
    sys.exit(print(f'error: {message}', file=sys.stderr) or 2)


parser.error = lambda message: require(False, f'{message}; see --help')
options = parser.parse_args()
file = options.folder / 'sample.jaxexport'
require(file.is_file(), f'there is no {file}: export the workdir of a generator')
try:
  about = json.loads((options.folder / 'about.json').read_text())
  inputs = [] if about['weights'] == 'inside' else [dict(np.load(options.folder / 'weights.npz'))]
  sample = export.deserialize(bytearray(file.read_bytes()))
except Exception as error:  # whatever a damaged file makes its reader raise
  require(False, f'{options.folder} is no whole export ({type(error).__name__}: {error}): export it again')
try:
  here, numbers = export.default_export_platform(), options.labels.split(',')
except (RuntimeError, AssertionError) as error:  # jax raises both where it finds no device
  require(False, f'jax finds no device of JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")} ({error}): unset it')
require(here in sample.platforms, f'{file} is for {", ".join(sample.platforms)}, this machine has {here}: export it '
        f'with --platforms={here}')
require(all(n.isdecimal() and int(n) < about['classes'] for n in numbers), f'--labels={options.labels}: give classes '
        f'from 0 to {about["classes"] - 1}, such as 0,1')
require(0 <= options.seed < 2**32, f'--seed={options.seed}: give a number from 0 to {2**32 - 1}')
require(0 <= options.cfg <= 100, f'--cfg={options.cfg}: give a number from 0 (no guidance) to 100')
require(options.out.suffix == '.npz' and os.access(options.out.parent, os.W_OK) and not options.out.is_dir(),
        f'--out={options.out}: give an .npz file in a folder that can be written to')

labels = np.array(numbers, np.int32)
try:
  images = jax.jit(sample.call)(*inputs, labels, np.uint32(options.seed), np.float32(options.cfg))
except (TypeError, ValueError) as error:
  require(False, f'the files in {options.folder} do not belong together, export again: {str(error).splitlines()[0]}')
np.savez(options.out, arr_0=np.asarray(images), labels=labels)
print(f'{len(labels)} images in {options.out}')
