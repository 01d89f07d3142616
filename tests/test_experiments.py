"""Every experiment's `runlocal` trains both stages, through the command line, on data of the kind that it is meant for.

Slow: minutes of compiling. `test_commands` reads every config in the fast suite, and trains smaller networks.
"""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_runs import optimizations

from var_jax.__main__ import main


@pytest.fixture(scope='module', autouse=True)
def compile_well():
  """These networks are large enough that running unoptimized programs takes longer than optimizing them."""
  with optimizations():
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Tiny data for the experiments that read files: {experiment: --config.data.path}."""
  root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      (root / 'folder' / split / name).mkdir(parents=True)
      for i in range(8):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(root / f'folder/{split}/{name}/{i}.png')
  images, labels = rng.integers(0, 256, (64, 28, 28), np.uint8), np.arange(64) % 10
  np.savez(root / 'fashion.npz', x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16])
  return {'folder': root / 'folder', 'fashion_mnist': root / 'fashion.npz'}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits', 'fashion_mnist', 'folder', 'imagenet256', 'imagenet512'])
def test_runlocal_trains_both_stages(name, data, tmp_path):
  # eight virtual devices share a batch of eight; two steps show that the pieces fit
  common = ['--config.steps=2', '--config.batch_size=8', '--config.pictures_every=0', '--config.eval_every=2']
  common += [f'--config.data.path={data[name]}'] if name in data else []
  tokenizer, generator = tmp_path / 'tokenizer', tmp_path / 'generator'
  assert main(['train', f'--config=experiments/{name}.py:tokenizer,runlocal', f'--workdir={tokenizer}', *common]) == 0
  assert main(['train', f'--config=experiments/{name}.py:generator,runlocal', f'--workdir={generator}',
               f'--config.tokenizer={tokenizer}', *common]) == 0
  lines = [json.loads(line) for line in (generator / 'metrics.jsonl').read_text().splitlines()]
  assert lines[-1]['step'] == 2 and np.isfinite(lines[-1]['validation/loss'])
