"""What goes beyond the published model and is off by default: Markov scales, scale weights, distilled guidance."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published_models
import pytest
from golden_files import assert_close
from tiny_runs import CERTAIN, Trainer, metrics_of, train_both

from var_jax.__main__ import main
from var_jax.generator import attention, losses, sampling
from var_jax.generator.sampling import Choices
from var_jax.pyramid import Pyramid


@pytest.fixture(scope='module')
def markov():
  """(Generator, params, Tokenizer, params): the published model's weights, seeing one scale at a time."""
  generator, params = published_models.generator()
  alone = generator.clone(pyramid=dataclasses.replace(generator.pyramid, markov=True))
  return alone, params, *published_models.tokenizer()


def test_markov_tokens_see_their_own_scale_alone(markov):
  generator, params, tokenizer, tokenizer_params = markov
  pyramid, first = generator.pyramid, generator.pyramid.sizes[0]
  teacher = jax.random.normal(jax.random.key(0), (2, pyramid.length - first, generator.channels))

  @jax.jit
  def influences(teacher):
    logits, pull_back = jax.vjp(lambda t: generator.apply({'params': params}, jnp.array([1, 2]), t), teacher)
    return [jnp.abs(pull_back(jnp.zeros_like(logits).at[:, s].set(jnp.cos(logits[:, s])))[0]).sum(axis=(0, 2))
            for s in pyramid.slices]

  for s, influence in zip(pyramid.slices, influences(teacher)):
    seen = np.zeros(pyramid.length, bool)
    seen[s] = True
    np.testing.assert_array_equal(influence > 0, seen[first:])


def test_markov_sampling_needs_no_cache_and_equals_teacher_forcing(markov):
  generator, params, tokenizer, tokenizer_params = markov
  both, labels = {'generator': params, 'tokenizer': tokenizer_params}, jnp.array([3, 7])
  draw = jax.jit(lambda keys: sampling.sample(generator, tokenizer, both, labels, keys, Choices(0.0, 0, 0.0)))
  out = draw(sampling.image_keys(0, jnp.arange(2)))
  teacher = tokenizer.apply({'params': tokenizer_params}, out.tokens_BxL, method='teacher_input')
  logits = jax.jit(generator.apply)({'params': params}, labels, teacher)
  assert_close(jnp.concatenate(out.guided_logits, axis=1), logits, rtol=1e-5)


def test_markov_splash_equals_xla():
  pyramid = Pyramid.of((1, 2, 3, 5, 8, 9))
  q, k, v = (jax.random.normal(jax.random.key(i), (1, pyramid.length, 2, 16)) for i in range(3))
  alone = dataclasses.replace(pyramid, markov=True)
  found = attention._splash(q, k, v, alone, interpret=True)
  np.testing.assert_allclose(found, attention.attend(q, k, v, alone, 'xla'), rtol=1e-5, atol=2e-5)
  assert np.abs(found - attention.attend(q, k, v, pyramid, 'xla')).max() > 0.1


def test_scale_weights_are_log_normal():
  pyramid = Pyramid.of((1, 2, 4))
  weight_L = losses.scale_weights(pyramid, mean=-0.5, sigma=0.8)
  assert weight_L.shape == (21,) and weight_L.mean() == pytest.approx(1)
  density = lambda x: np.exp(-(np.log(x) + 0.5) ** 2 / (2 * 0.64)) / x
  assert np.isfinite(losses.scale_weights(pyramid, mean=-5, sigma=0.01)).all()
  assert weight_L[0] / weight_L[-1] == pytest.approx(density(1 / 3) / density(1), rel=1e-5)
  plain, weighted = (Trainer('generator', **CERTAIN, **{'scale_weights.sigma': sigma}).run(1)[0]
                     for sigma in (0.0, 0.5))
  assert plain[1]['loss'] == weighted[1]['loss'] and plain[1]['gradient_norm'] != weighted[1]['gradient_norm']


def test_guidance_that_is_learned_is_that_of_sampling():
  generator, params = published_models.generator()
  tokenizer, tokenizer_params = published_models.tokenizer()
  both, labels = {'generator': params, 'tokenizer': tokenizer_params}, jnp.array([3, 7])
  draw = lambda keys: sampling.sample(generator, tokenizer, both, labels, keys, Choices(2.0, 0, 0.0))
  out = jax.jit(lambda keys: draw(keys)._replace(image_BxHxWx3=None))(sampling.image_keys(0, jnp.arange(2)))
  stage = copy.copy(Trainer('generator', distill=2.0).stage)
  stage.generator = generator
  teacher = tokenizer.apply({'params': tokenizer_params}, out.tokens_BxL, method='teacher_input')
  assert_close(stage._guided(stage.generator, params, labels, teacher), jnp.concatenate(out.guided_logits, axis=1), rtol=1e-5)


def test_divergence_is_zero_for_equal_logits_alone():
  a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 7))
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (np.float64(a), np.float64(b)))
  np.testing.assert_allclose(losses.divergence(a, b), (p * np.log(p / q)).sum(-1), rtol=1e-4)
  np.testing.assert_allclose(losses.divergence(a, a + 3), 0, atol=1e-6)


@pytest.mark.slow
def test_guidance_is_learned_from_another_run(tmp_path_factory, tmp_path, capsys):
  experiment, tokenizer, first = train_both(tmp_path_factory)[:3]
  command = ['train', f'--config={experiment}:generator', f'--workdir={tmp_path / "w"}', '--config.distill=2',
             f'--config.tokenizer={tokenizer}', '--config.steps=30', '--config.label_drop=0', '--config.ema=0']
  assert main(command) == 2
  assert '--config.start_from' in capsys.readouterr().err
  assert main([*command, f'--config.start_from={first}', '--config.model.markov=True']) == 2
  assert 'start_from has pyramid' in capsys.readouterr().err
  assert main([*command, f'--config.start_from={first}', '--config.optimizer.peak_lr=0.01']) == 0
  found = [line['train/distillation'] for line in metrics_of(tmp_path / 'w') if 'train/distillation' in line]
  assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5]) and min(found) >= 0
