"""Runs what `var-jax export` wrote, with jax and numpy alone: no var_jax.

python launch/run_artifact.py FOLDER --labels=0,3,7 --seed=0 --cfg=1.5 --out=images.npz
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
from jax import export

parser = argparse.ArgumentParser(description='Draws images with an exported sampler.')
parser.add_argument('folder', type=pathlib.Path)
parser.add_argument('--labels', default='0', help='classes, such as 0,3,7')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--cfg', type=float, default=1.5)
parser.add_argument('--out', default='images.npz')
options = parser.parse_args()

file, weights = options.folder / 'sample.jaxexport', options.folder / 'weights.npz'
if not file.is_file():
  sys.exit(print(f'error: there is no {file}: export the workdir of a generator', file=sys.stderr) or 2)
sample = export.deserialize(bytearray(file.read_bytes()))
here = export.default_export_platform()
if here not in sample.platforms:
  sys.exit(print(f'error: {file} is for {", ".join(sample.platforms)}, this machine has {here}: export it with '
                 f'--platforms={here}', file=sys.stderr) or 2)
inputs = [dict(np.load(weights))] if weights.exists() else []
labels = np.array(options.labels.split(','), np.int32)
images = jax.jit(sample.call)(*inputs, labels, np.uint32(options.seed), np.float32(options.cfg))
np.savez(options.out, arr_0=np.asarray(images), labels=labels)
print(f'{len(labels)} images in {options.out}')
