"""Fine-tuning: from other class counts and scales, with parts that stay, and without the model that it began with."""

import shutil

import numpy as np
import pytest
from tiny_runs import differing, train_both

from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.generator import adapt
from var_jax.pyramid import Pyramid

pytestmark = pytest.mark.slow

SHORT = ['--config.steps=3', '--config.checkpoint_every=1']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return train_both(tmp_path_factory)


def train(trained, stage, workdir, *options):
  command = ['train', f'--config={trained[0]}:{stage}', f'--workdir={workdir}', *SHORT, *options]
  return main(command + ([f'--config.tokenizer={trained[1]}'] if stage == 'generator' else []))


def params_of(workdir):
  load = workdir_lib.load_generator if (workdir / 'tokenizer').exists() else workdir_lib.load_tokenizer
  return load(workdir)[1]


@pytest.mark.parametrize('stage, frozen, untouched', [
    ('generator', 'word_embed/*,blocks/attention/*', ['word_embed', 'blocks.attention']),
    pytest.param('tokenizer', 'encoder/*,quant*', ['encoder', 'quantizer', 'quant_conv'], marks=pytest.mark.slow)])
def test_frozen_parts_stay_and_the_rest_is_trained(trained, tmp_path, stage, frozen, untouched):
  start = trained[1 + (stage == 'generator')]
  assert train(trained, stage, tmp_path / 'w', f'--config.start_from={start}', f'--config.freeze={frozen}') == 0
  old, new = params_of(start), params_of(tmp_path / 'w')
  changed = {name.replace("']['", '.')[2:-2] for name in differing(old, new)}
  assert changed and not [name for name in changed if name.startswith(tuple(untouched))]
  assert len(changed) >= len(set(names(old)) - set(names(old, untouched))) - 2  # gradients of some are zero


def names(tree, prefixes=('',)):
  flat = adapt.flatten_dict(tree, sep='.')
  return [name for name in flat if name.startswith(tuple(prefixes))]


def test_run_begins_with_the_other_runs_parameters_and_goes_on_without_it(trained, tmp_path, capsys):
  start = tmp_path / 'start'
  shutil.copytree(trained[2], start)
  (tmp_path / 'w' / 'checkpoints' / '1.orbax-checkpoint-tmp').mkdir(parents=True)  # killed during its first save
  options = [f'--config.start_from={start}', '--config.optimizer.peak_lr=1e-30']
  assert train(trained, 'generator', tmp_path / 'w', *options, '--config.steps=1') == 0
  assert not differing(params_of(start), params_of(tmp_path / 'w'))
  shutil.rmtree(start)
  assert train(trained, 'generator', tmp_path / 'w', *options) == 0
  assert 'resuming from step 1' in capsys.readouterr().err


@pytest.mark.slow
def test_other_class_count_and_scales_can_be_trained(trained, tmp_path):
  other = tmp_path / 'tokenizer'
  assert train(trained, 'tokenizer', other, '--config.model.scales=(1,3,4)', f'--config.start_from={trained[1]}') == 0
  command = ['train', f'--config={trained[0]}:generator', f'--workdir={tmp_path / "w"}', *SHORT,
             f'--config.tokenizer={other}', f'--config.start_from={trained[2]}', '--config.model.classes=12']
  assert main(command) == 0
  params = params_of(tmp_path / 'w')
  assert params['class_embedding'].shape == (13, 32) and params['position'].shape == (26, 32)


def test_rule_of_adaptation():
  """Same places keep their values; new ones take the nearest scale's map, the levels in between, and "no class"."""
  rng = np.random.default_rng(0)

  class Like:
    def __init__(self, classes, scales):
      self.classes, self.pyramid = classes, Pyramid.of(scales)

  old, new = Like(3, (1, 2, 4)), Like(5, (1, 2, 3, 4, (8, 4)))
  params = {'class_embedding': rng.normal(size=(4, 6)), 'level_embedding': rng.normal(size=(3, 6)),
            'position': rng.normal(size=(21, 6)), 'start': rng.normal(size=(1, 6)), 'rest': rng.normal(size=2)}
  sizes = {'class_embedding': (6, 6), 'level_embedding': (5, 6), 'position': (62, 6), 'start': (1, 6), 'rest': (2,)}
  out = adapt.adapted(params, old, new, {name: np.empty(size) for name, size in sizes.items()})
  assert (out['class_embedding'] == params['class_embedding'][-1]).all()
  np.testing.assert_allclose(out['level_embedding'][[0, 2, 4]], params['level_embedding'], rtol=1e-6)
  np.testing.assert_allclose(out['level_embedding'][1], params['level_embedding'][:2].mean(0), rtol=1e-5)
  np.testing.assert_allclose(out['position'][:5], params['position'][:5], rtol=1e-6)  # 1x1 and 2x2
  np.testing.assert_allclose(out['position'][14:30], params['position'][5:], rtol=1e-6)  # 4x4
  small, large = params['position'][1:5].reshape(2, 2, 6), out['position'][5:14].reshape(3, 3, 6)  # 3x3 from 2x2
  np.testing.assert_allclose(large[1, 1], small.mean((0, 1)), rtol=1e-5)
  np.testing.assert_allclose(large[0, 0], small[0, 0], rtol=1e-5)
  tall = out['position'][30:].reshape(8, 4, 6)  # from 4x4
  np.testing.assert_allclose(tall[0], params['position'][5:9], rtol=1e-5)
  assert (out['start'] == params['start']).all() and (out['rest'] == params['rest']).all()


@pytest.mark.parametrize('stage, options, word', [
    ('generator', ['--config.start_from=TRAINED', '--config.model.width=16'], 'width 32, this run 16'),
    ('generator', ['--config.start_from=TRAINED', '--config.model.heads=4'], 'heads 2, this run 4'),
    ('generator', ['--config.start_from=nowhere'], 'nowhere'),
    ('generator', ['--config.start_from=TOKENIZER'], 'holds a tokenizer'),
    ('tokenizer', ['--config.start_from=TOKENIZER', '--config.model.codes=16'], 'codes 32, this run 16'),
    ('generator', ['--config.freeze=decoder/*'], 'names no parameter'),
    ('generator', ['--config.freeze=*'], 'nothing to train'),
    ('tokenizer', ['--config.freeze=quantizer/*', '--config.codebook.restart_every=1'], 'restart_every=0')])
def test_what_does_not_fit_is_refused(trained, tmp_path, capsys, stage, options, word):
  options = [o.replace('TRAINED', str(trained[2])).replace('TOKENIZER', str(trained[1])) for o in options]
  capsys.readouterr()
  assert train(trained, stage, tmp_path / 'w', *options) == 2
  error = capsys.readouterr().err.strip()
  assert word in error and '\n' not in error and not (tmp_path / 'w/config.json').exists()
