"""The golden numbers: outputs of the published PyTorch implementation, and weights rebuilt from a formula.

`tests/golden/*.npz` holds inputs and outputs, `tests/golden/*manifest.json` each tensor's name, shape and range.
"""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'golden'


def load(name):
  """Arrays of `tests/golden/NAME.npz` as a dict."""
  with np.load(FOLDER / f'{name}.npz') as arrays:
    return {key: arrays[key] for key in arrays.files}


def uniform(key, shape):
  """Uniform values in [-1, 1) for a text key: splitmix64 of the index, seeded by the key's CRC-32."""
  x = np.arange(np.prod(shape), dtype=np.uint64) + (np.uint64(zlib.crc32(key.encode())) << np.uint64(32))
  with np.errstate(over='ignore'):
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return (2 * ((x >> np.uint64(40)).astype(np.float64) / 2**24) - 1).reshape(shape)


def weights(model, manifest='manifest.json'):
  """(config, {name: float32 array}) of a model of the manifest, in PyTorch's names and layouts."""
  spec = json.loads((FOLDER / manifest).read_text())
  spec = spec['models'][model] if 'models' in spec else spec
  tensors = {}
  for name, t in spec['tensors'].items():
    u = uniform(f'{spec["tag"]}/{name}', t['shape'])
    tensors[name] = np.float32(t['center']) + np.float32(t['half_width']) * u.astype(np.float32)
  return spec.get('config', {}), tensors


def assert_close(actual, desired, rtol=1e-4):
  """Agreement relative to the largest magnitude of what is desired: the golden README's 'about 1e-4 relative'."""
  actual, desired = np.asarray(actual), np.asarray(desired)
  assert actual.shape == desired.shape, (actual.shape, desired.shape)
  np.testing.assert_allclose(actual, desired, rtol=rtol, atol=rtol * np.abs(desired).max())
