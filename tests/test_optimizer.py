"""The optimizer: the published schedules and step, and steps without finite gradients."""


import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_models
import pytest
from golden_files import assert_close
from tiny_runs import FULL, Line, Trainer, differing, metrics_of, some_batch, tiny_config, train_line

from var_jax.errors import UserError
from var_jax.generator import losses as generator_losses
from var_jax.interop import published
from var_jax.training import optimizer as optimizer_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.state import TrainState


@pytest.mark.parametrize('kind', ['cos', 'lin', 'lin0', 'lin00', 'exp'])
def test_schedules_match_published_implementation(kind):
  iteration, rate, decay = golden_files.load('schedules')[kind].T
  ours = optimizer_lib.learning_rate(kind, 3e-4, 1000, 20, start_ratio=0.005, end_ratio=0.1)
  np.testing.assert_allclose([ours(i) for i in iteration], rate, rtol=1e-4)
  ours = optimizer_lib.weight_decay(0.05, 0.08, 1000)
  np.testing.assert_allclose([ours(i) for i in iteration], decay, rtol=1e-4)


@pytest.mark.parametrize('kind', optimizer_lib.SCHEDULES)
def test_what_joins_later_has_the_runs_rate_but_for_its_own_warm_up(kind):
  config = tiny_config('tokenizer', **{'optimizer.schedule': kind, 'optimizer.warmup': 0.02}).optimizer
  run = optimizer_lib.learning_rate(kind, 5.0, 1000, 20, config.start_ratio, config.end_ratio)
  rates = lambda start: [optimizer_lib.joining_later(config, 5.0, 1000, start)(i) for i in range(0, 1000, 5)]
  expected = [run(i) for i in range(0, 1000, 5)]
  np.testing.assert_allclose(rates(0), expected, rtol=1e-6)
  later = rates(400)
  np.testing.assert_allclose(later[84:], expected[84:], rtol=1e-6)
  np.testing.assert_allclose(later[80], config.start_ratio * expected[80], rtol=1e-6)
  assert np.all(np.diff(later[80:85]) > 0)


def in_torch(params):
  """{published name: array} of our parameters, which stack the blocks."""
  return published.to_published(params, published.generator_names(params))


def named(golden, prefix):
  return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


@pytest.fixture(scope='module')
def published_step():
  """(golden numbers, parameters, metrics, gradients) of the published generator's training step."""
  model, params = published_models.generator()
  golden, vae = golden_files.load('train_step'), golden_files.load('vae')
  labels, tokens = golden_files.load('var')['labels'], published_models.tokens(vae)

  def loss(params):
    logits = model.apply({'params': params}, labels, vae['var_input'])
    metrics = generator_losses.summarize(logits, tokens, model.pyramid)
    return metrics['loss'], metrics

  grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(params)
  return golden, params, metrics, grads


def test_losses_and_gradients_match_published_implementation(published_step):
  golden, _, metrics, grads = published_step
  assert_close(metrics['loss'], golden['loss'])
  assert_close([metrics[f'loss/scale_{k}'] for k in range(4)], golden['loss_per_scale'])
  assert_close(metrics['loss/last'], golden['loss_per_scale'][-1])
  assert_close(metrics['accuracy'], golden['accuracy'])
  assert_close(optax.tree.norm(grads), golden['grad_norm'])
  norms = named(golden, 'gradnorm/')
  assert len(norms) == 46
  assert norms.keys() == in_torch(grads).keys()
  for name, grad in in_torch(grads).items():
    assert_close(np.linalg.norm(grad), norms[name])


def test_optimizer_step_matches_published_implementation(published_step):
  golden, params, _, grads = published_step
  adamw = optimizer_lib.adamw(1e-3, 0.05, (0.9, 0.95), clip=2.0)
  state, metrics = jax.jit(lambda p, g: TrainState.create(0, p, adamw, ema=False).updated(g, adamw))(params, grads)
  assert_close(metrics['gradient_norm'], golden['grad_norm'])
  norms = named(golden, 'update_norm/')
  assert len(norms) == 46
  old, new = in_torch(params), in_torch(state.params)
  for name, norm in norms.items():
    update = np.float64(new[name]) - np.float64(old[name])
    np.testing.assert_allclose(np.linalg.norm(update), norm, rtol=2e-4, err_msg=name)
  for name, value in named(golden, 'updated/').items():
    assert_close(new[name], value, rtol=1e-5)


def test_weight_decay_holds_the_published_tensors_alone(published_step):
  golden, params, *_ = published_step
  whole = lambda path, x: np.full(x.shape, optimizer_lib.is_decayed(path, x))
  decayed = jax.tree_util.tree_map_with_path(whole, params)
  assert {name for name, whole in in_torch(decayed).items() if np.all(whole)} == set(golden['decayed'])




def poisoned(kind, initial):
  """(state, batch) whose gradients are not finite."""
  if kind == 'tokenizer':
    batch = some_batch()
    batch['image'][3, 2, 2] = np.inf
    return initial, batch
  tokenizer = dict(initial.frozen['tokenizer'])  # a generator sees images through tokens, which are finite always
  tokenizer['quantizer'] = tokenizer['quantizer'] | {'codebook': tokenizer['quantizer']['codebook'] * np.nan}
  return initial.replace(frozen={'tokenizer': tokenizer}), some_batch()


@pytest.mark.parametrize('kind', [pytest.param('tokenizer', marks=pytest.mark.slow), 'generator'])
def test_step_without_finite_gradients_changes_nothing_but_counters(kind):
  trainer = Trainer(kind, **(FULL if kind == 'tokenizer' else {}))
  before = trainer.run(6)[-1][0] if kind == 'tokenizer' else trainer.run(1)[-1][0]  # discriminator at work
  state, batch = poisoned(kind, before)
  for count in (1, 2):
    state, metrics = trainer.step(state, batch)
    assert not np.isfinite(metrics['gradient_norm'])
    assert (state.step, state.skipped, state.skipped_in_row) == (before.step + count, count, count)
    assert (metrics['skipped'], metrics['skipped_in_row']) == (count, count)
    for part in ('key', 'params', 'opt_state', 'ema', 'extra'):
      assert differing(getattr(state, part), getattr(before, part)) == [], part
  state, metrics = trainer.step(state.replace(frozen=before.frozen), some_batch())
  assert np.isfinite(metrics['gradient_norm']) and (state.skipped, state.skipped_in_row) == (2, 0)
  assert differing(state.params, before.params)


def test_run_stops_after_too_many_steps_without_finite_gradients(tmp_path):
  with pytest.raises(UserError, match=r'3 steps in a row.*not finite.*checkpoint is step 4') as error:
    train_line(Line(100, breaks=4), tmp_path, max_skipped_in_row=3, log_every=1000)
  assert '\n' not in str(error.value)
  with Checkpoints(tmp_path) as checkpoints:
    assert max(checkpoints.steps()) == 4  # nothing was saved after it


def test_finite_steps_in_between_reset_the_count(tmp_path):
  stage = Line(12)
  finite = stage.train_step

  def every_third(state, batch, phase):
    return finite(state, batch | {'image': jnp.where(state.step % 3 > 0, jnp.nan, batch['image'])}, phase)

  stage.train_step = every_third
  state, _ = train_line(stage, tmp_path, max_skipped_in_row=3)
  assert (state.step, state.skipped, state.skipped_in_row) == (12, 8, 2)
  assert metrics_of(tmp_path)[-1]['train/skipped'] == 8


def test_run_writes_what_its_intervals_say(tmp_path):
  train_line(Line(7), tmp_path, log_every=2, eval_every=3, checkpoint_every=2, keep=3)
  lines = metrics_of(tmp_path)
  trained = [line['step'] for line in lines if 'train/loss' in line]
  evaluated = [line['step'] for line in lines if 'validation/w' in line]
  assert (trained, evaluated) == ([2, 4, 6, 7], [3, 6, 7])
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [4, 6, 7]
