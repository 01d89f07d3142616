"""Training: the published schedules and step, runs that go on as if never stopped, devices that make no difference."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_models
import pytest
from golden_files import assert_close
from jax.experimental.compilation_cache import compilation_cache

from var_jax import workdir as workdir_lib
from var_jax.data.sources import ArraySource, open_source
from var_jax.errors import UserError
from var_jax.generator import losses as generator_losses
from var_jax.interop import published
from var_jax.pyramid import Pyramid
from var_jax.stages.generator import GeneratorStage
from var_jax.stages.tokenizer import TokenizerStage
from var_jax.tokenizer import losses as tokenizer_losses
from var_jax.training import loop, mesh as mesh_lib, optimizer as optimizer_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.state import TrainState, accumulated

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ['tokenizer', 'generator']

EXPERIMENT = '''"""Both stages on 8 px digits, as small as they get, for the tests."""

from var_jax import configs


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, depth=2, runlocal=False)
  config = configs.tokenizer() if stage == 'tokenizer' else configs.generator(options['depth'])
  config.update(batch_size=8, steps=8, ema=0.9, log_every=1, eval_every=0, pictures_every=0, checkpoint_every=4)
  config.eval_images = 20
  config.optimizer.update(peak_lr=1e-3, warmup=0.0)
  if stage == 'tokenizer':
    config.image_size = (8, 8)
    config.model.update(scales=(1, 2, 4), codes=32, channels=8, ch=8, ch_mult=(1, 2), res_blocks=1)
    config.loss.discriminator_ch = 8
  else:
    config.model.update(width=32, heads=2, classes=10)
    config.sample.update(top_k=0, top_p=0.9)
  return config
'''

# Everything that a tokenizer's training can turn on, and in eight steps.
FULL = {'loss.adversarial': 0.5, 'loss.adversarial_start': 0.5, 'codebook.restart_every': 1,
        'codebook.restart_after': 2, 'codebook.scale_dropout': 0.5}
# A generator without randomness: labels always dropped, paths never.
CERTAIN = {'label_drop': 1.0, 'drop_path': 0.0}


@pytest.fixture(scope='module', autouse=True)
def compile_little(tmp_path_factory):
  """Programs are compiled without costly optimizations, and once for all tests and the processes that they start."""
  folder = jax.config.jax_compilation_cache_dir or str(tmp_path_factory.getbasetemp() / 'compiled')
  wanted = {'jax_compilation_cache_dir': folder, 'jax_persistent_cache_min_compile_time_secs': 0.0,
            'jax_disable_most_optimizations': True}
  old = {name: jax.config.values[name] for name in wanted}
  compilation_cache.reset_cache()  # jax looks at its folder once
  for name, value in wanted.items():
    jax.config.update(name, value)
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  return write_experiment(tmp_path_factory.mktemp('experiments'))


def write_experiment(folder):
  file = folder / 'tiny.py'
  file.write_text(EXPERIMENT)
  return file


def tiny_config(kind, **changes):
  """The experiment's config with changes such as **{'optimizer.peak_lr': 1}."""
  names = {}
  exec(EXPERIMENT, names)
  config = names['get_config'](kind)
  config.update_from_flattened_dict(changes)
  return config.lock()


@functools.cache
def _stage(kind, changes):
  config = tiny_config(kind, **dict(changes))
  if kind == 'tokenizer':
    return TokenizerStage(config, workdir_lib.make_tokenizer(config), config.steps)
  tokenizer, state = _stage('tokenizer', ()).tokenizer, _initial('tokenizer', ())
  params = jax.tree.map(jnp.asarray, state.params)
  return GeneratorStage(config, workdir_lib.make_generator(config, tokenizer), tokenizer, params, 'abc', config.steps)


@functools.cache
def _initial(kind, changes):
  return jax.tree.map(np.asarray, _stage(kind, changes).init())


@functools.cache
def _compiled(kind, changes, devices, method):
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  stage = _stage(kind, changes)
  function = jax.jit(getattr(stage, method), donate_argnums=0 if method == 'train_step' else ())

  def run(state, batch):
    with jax.set_mesh(mesh):
      return jax.device_get(function(mesh_lib.put_state(state, mesh), mesh_lib.put_batch(batch, mesh)))

  def lowered(state, batch):
    with jax.set_mesh(mesh):
      return function.lower(mesh_lib.put_state(state, mesh), mesh_lib.put_batch(batch, mesh))

  run.lowered = lowered
  return run


class Trainer:
  """A stage of the tiny experiment with its state before the first step, as NumPy arrays, and its compiled steps."""

  def __init__(self, kind, devices=1, **changes):
    key = kind, tuple(sorted(changes.items()))
    self.stage, self.initial = _stage(*key), _initial(*key)
    self.step, self.evaluate = (_compiled(*key, devices, name) for name in ('train_step', 'eval_step'))

  def run(self, steps, state=None):
    """[(state, metrics)] after each of some steps, each on a batch of its own."""
    state, out = self.initial if state is None else state, []
    for _ in range(steps):
      state, metrics = self.step(state, some_batch(int(state.step)))
      out.append((state, metrics))
    return out


def some_batch(seed=0, size=8):
  rng = np.random.default_rng(seed)
  image = rng.uniform(-1, 1, (8, size, size, 3)).astype(np.float32)
  return {'image': image, 'label': rng.integers(0, 10, 8).astype(np.int32), 'mask': np.ones(8, np.float32)}


def leaves(tree):
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def differing(a, b):
  """Names of the leaves that are not bit for bit the same."""
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  return [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]


def farthest(a, b):
  """The largest difference between two trees, relative to their largest value."""
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  return max(np.abs(a[n] - b[n]).max() for n in a) / max(np.abs(x).max() for x in b.values())


def moments(state, name):
  return optax.tree.get(state.opt_state, name)


# --- schedules and the optimizer's step ------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['cos', 'lin', 'lin0', 'lin00', 'exp'])
def test_schedules_match_published_implementation(kind):
  iteration, rate, decay = golden_files.load('schedules')[kind].T
  ours = optimizer_lib.learning_rate(kind, 3e-4, 1000, 20, start_ratio=0.005, end_ratio=0.1)
  np.testing.assert_allclose([ours(i) for i in iteration], rate, rtol=1e-4)
  ours = optimizer_lib.weight_decay(0.05, 0.08, 1000)
  np.testing.assert_allclose([ours(i) for i in iteration], decay, rtol=1e-4)


def ours_of(params, name):
  """(a published tensor's part of our parameters, its layout): our blocks are stacked along a leading axis."""
  if match := re.fullmatch(r'blocks\.(\d+)\.(.+)', name):
    path, layout = published._BLOCK[match[2]]
    return functools.reduce(lambda tree, key: tree[key], ('blocks', *path), params)[int(match[1])], layout
  path, layout = published._OUTSIDE[name]
  return functools.reduce(lambda tree, key: tree[key], path, params), layout


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
  for name, norm in norms.items():
    assert_close(np.linalg.norm(ours_of(grads, name)[0]), norm)


def test_optimizer_step_matches_published_implementation(published_step):
  golden, params, _, grads = published_step
  adamw = optimizer_lib.adamw(1e-3, 0.05, (0.9, 0.95), clip=2.0)
  state, metrics = jax.jit(lambda p, g: TrainState.create(0, p, adamw, ema=False).updated(g, adamw))(params, grads)
  assert_close(metrics['gradient_norm'], golden['grad_norm'])
  norms = named(golden, 'update_norm/')
  assert len(norms) == 46
  for name, norm in norms.items():
    (old, _), (new, _) = ours_of(params, name), ours_of(state.params, name)
    np.testing.assert_allclose(np.linalg.norm(np.float64(new) - np.float64(old)), norm, rtol=2e-4, err_msg=name)
  for name, value in named(golden, 'updated/').items():
    new, layout = ours_of(state.params, name)
    assert_close(new, layout(value), rtol=1e-5)


def test_weight_decay_holds_the_published_tensors_alone(published_step):
  golden, params, *_ = published_step
  decayed = jax.tree_util.tree_map_with_path(lambda path, x: np.full(len(x), optimizer_lib.is_decayed(path, x)), params)
  names = named(golden, 'gradnorm/')
  assert {name for name in names if np.all(ours_of(decayed, name)[0])} == set(golden['decayed'])


# --- steps without finite gradients ----------------------------------------------------------------------------------


def poisoned(kind, initial):
  """(state, batch) whose gradients are not finite."""
  if kind == 'tokenizer':
    batch = some_batch()
    batch['image'][3, 2, 2] = np.inf
    return initial, batch
  tokenizer = dict(initial.frozen['tokenizer'])  # a generator sees images through tokens, which are finite always
  tokenizer['quantizer'] = tokenizer['quantizer'] | {'codebook': tokenizer['quantizer']['codebook'] * np.nan}
  return initial.replace(frozen={'tokenizer': tokenizer}), some_batch()


@pytest.mark.parametrize('kind', STAGES)
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


class Line:
  """The smallest stage: one number drawn towards the images' mean. From step `breaks` on its gradients are NaN."""

  name, metadata, image_size = 'line', {'line': 'a'}, (8, 8)

  def __init__(self, steps, breaks=None, events=None):
    self.steps, self.breaks, self.events, self.optimizer = steps, breaks, events, optax.sgd(0.1)

  def init(self):
    return TrainState.create(0, {'w': jnp.ones(())}, self.optimizer, ema=False)

  def check_metadata(self, metadata):
    assert metadata['line'] == 'a'

  def train_step(self, state, batch):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p['w'] - batch['image']) ** 2))(state.params)
    if self.breaks is not None:
      grads = jax.tree.map(lambda g: jnp.where(state.step >= self.breaks, jnp.nan, g), grads)
    state, metrics = state.updated(grads, self.optimizer)
    return state, {'loss': loss} | metrics

  def eval_step(self, state, batch):
    return {'sum': jnp.sum(batch['mask'] * state.model['w']), 'images': batch['mask'].sum()}

  def summarize(self, sums):
    return {'w': sums['sum'] / sums['images']}

  def pictures(self, state, batch):
    return {'first': np.zeros((8, 8, 3), np.uint8)}


def numbers(count=32):
  pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
  return ArraySource(pixels, np.arange(count) % 10, tuple('0123456789'))


def train_line(stage, workdir, checkpoints=None, **changes):
  config = tiny_config('tokenizer', **changes)
  checkpoints, said = checkpoints or Checkpoints(workdir, config.keep), []
  try:
    state = loop.train(stage, config, numbers(), numbers(20), checkpoints, workdir, say=said.append)
  finally:
    checkpoints.close()
  return jax.device_get(state), said


def metrics_of(workdir):
  return [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


def test_run_stops_after_too_many_steps_without_finite_gradients(tmp_path):
  with pytest.raises(UserError, match=r'3 steps in a row.*not finite.*checkpoint is step 4') as error:
    train_line(Line(100, breaks=4), tmp_path, max_skipped_in_row=3, log_every=1000)
  assert '\n' not in str(error.value)
  checkpoints = Checkpoints(tmp_path)
  assert max(checkpoints.steps()) == 4  # nothing was saved after it
  checkpoints.close()


def test_finite_steps_in_between_reset_the_count(tmp_path):
  stage = Line(12)
  finite = stage.train_step

  def every_third(state, batch):
    return finite(state, batch | {'image': jnp.where(state.step % 3 > 0, jnp.nan, batch['image'])})

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


# --- average, accumulation, devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', STAGES)
def test_average_follows_its_recursion_and_evaluation_uses_it(kind):
  trainer = Trainer(kind)
  average, states = leaves(trainer.initial.params), trainer.run(4)
  for step, (state, _) in enumerate(states):
    decay = min(0.9, (1 + step) / (10 + step))
    average = {name: decay * average[name] + (1 - decay) * x for name, x in leaves(state.params).items()}
  last = states[-1][0]
  for name, value in leaves(last.ema).items():
    np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-7)
  assert differing(last.model, last.ema) == [] and differing(last.ema, last.params)
  sums = trainer.evaluate(last, some_batch())
  assert differing(trainer.evaluate(last.replace(params=trainer.initial.params), some_batch()), sums) == []
  assert differing(trainer.evaluate(last.replace(ema=last.params), some_batch()), sums)


def test_average_can_be_left_out():
  state, sgd = TrainState.create(0, {'w': jnp.ones(2)}, optax.sgd(1.0), ema=False), optax.sgd(1.0)
  state, _ = state.updated({'w': jnp.ones(2)}, sgd)
  assert state.ema is None and np.all(state.model['w'] == 0)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
  whole, parts = (Trainer('generator', accumulate=n, **CERTAIN).run(1)[0] for n in (1, 4))
  assert_close(parts[1]['gradient_norm'], whole[1]['gradient_norm'], rtol=1e-5)
  assert_close(parts[1]['loss'], whole[1]['loss'], rtol=1e-5)
  assert farthest(moments(parts[0], 'mu'), moments(whole[0], 'mu')) < 1e-5


def test_accumulated_slices_have_keys_of_their_own():
  noisy = lambda w, batch, key: (jnp.mean(w * batch) * jax.random.normal(key), jax.random.normal(key))
  gradient, noise = accumulated(noisy, jnp.ones(()), jnp.ones(8), jax.random.key(0), 4)
  each = [jax.random.normal(jax.random.fold_in(jax.random.key(0), i)) for i in range(4)]
  assert_close(gradient, np.mean(each), rtol=1e-6)
  assert_close(noise, np.mean(each), rtol=1e-6)


@pytest.mark.parametrize('kind', STAGES)
def test_eight_devices_compute_what_one_does(kind):
  one, eight = Trainer(kind, devices=1), Trainer(kind, devices=8)
  mesh = mesh_lib.make_mesh()
  assert mesh.size == 8 and mesh_lib.make_mesh(jax.devices()[:1]).size == 1
  image = mesh_lib.put_batch(some_batch(), mesh)['image']
  assert image.sharding.num_devices == 8 and {s.data.shape for s in image.addressable_shards} == {(1, 8, 8, 3)}
  text = eight.step.lowered(eight.initial, some_batch()).as_text()
  assert re.search(r'sharding<@\w+, \[\{"data"\}', text) and '"data"=8' in text
  clear = jax.tree.map(lambda p: True, one.initial.params)
  for (a, a_metrics), (b, b_metrics) in zip(one.run(2), eight.run(2)):
    assert_close(b_metrics['loss'], a_metrics['loss'], rtol=1e-5)
    assert_close(b_metrics['gradient_norm'], a_metrics['gradient_norm'], rtol=1e-5)
    mu, nu = moments(a, 'mu'), moments(a, 'nu')
    assert farthest(moments(b, 'mu'), mu) < 1e-5 and farthest(moments(b, 'nu'), nu) < 1e-5
    # Adam makes a full step of any gradient, however small: leave out what is rounding noise on one device as well.
    least = 1e-4 * max(np.abs(m).max() for m in leaves(mu).values())
    clear = jax.tree.map(lambda c, m: c & (np.abs(m) > least), clear, mu)
    assert np.mean(np.concatenate([c.ravel() for c in leaves(clear).values()])) > 0.03
    apart = jax.tree.map(lambda c, p, q: np.abs(np.where(c, p - q, 0)).max(), clear, a.params, b.params)
    assert max(leaves(apart).values()) < 1e-5, apart


def test_batch_that_devices_cannot_share_is_refused():
  mesh = mesh_lib.make_mesh()
  mesh_lib.check_batch(32, mesh, 4)
  for size, parts in ((12, 1), (8, 2), (4, 1)):
    with pytest.raises(UserError, match=f'batch_size {size} cannot be shared by 8 devices'):
      mesh_lib.check_batch(size, mesh, parts)


# --- what a loss is made of ------------------------------------------------------------------------------------------


def test_scales_join_progressive_training_one_by_one():
  pyramid = Pyramid.of((1, 2, 3, 4, 5))
  firsts = [s.start for s in pyramid.slices]
  weights = lambda step: np.asarray(generator_losses.progressive_weights(
      step, 1000, pyramid, start_scale=1, end=0.5, warmup=20, ramp=10))
  table = np.stack([weights(step) for step in range(0, 1000, 5)])
  assert table.shape == (200, pyramid.length)
  assert all(np.ptp(table[:, s], axis=1).max() == 0 for s in pyramid.slices)  # one weight a scale
  table = table[:, firsts]
  np.testing.assert_array_equal(table[0], [1, 1, 0, 0, 0])
  np.testing.assert_array_equal(table[4], [1, 1, 0, 0, 0])  # the end of the warm-up
  assert np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) <= 0)
  np.testing.assert_array_equal(table[100:], 1)
  joined = [int(np.argmax(table[:, k] > 0)) for k in (2, 3, 4)]
  assert 4 < joined[0] < joined[1] < joined[2] < 100
  assert np.any((table > 0) & (table < 1))


def test_training_without_labels_does_not_see_them():
  trainer = Trainer('generator', accumulate=1, **CERTAIN)
  batch = some_batch()
  other = batch | {'label': (batch['label'] + 5) % 10}
  (state, metrics), (_, changed) = trainer.step(trainer.initial, batch), trainer.step(trainer.initial, other)
  assert metrics['loss'] == changed['loss'] and metrics['gradient_norm'] == changed['gradient_norm']
  embedding = moments(state, 'mu')['class_embedding']
  assert np.all(embedding[:10] == 0) and np.any(embedding[10] != 0)  # only "no class" learns
  assert trainer.evaluate(trainer.initial, batch)['loss'] != trainer.evaluate(trainer.initial, other)['loss']


def test_evaluation_counts_masked_images_alone():
  trainer = Trainer('generator')
  batch = some_batch()
  half = batch | {'mask': np.float32([1, 1, 1, 0, 0, 0, 0, 0])}
  noise = half | {'image': np.where(half['mask'][:, None, None, None] > 0, half['image'], 0.5)}
  sums = trainer.evaluate(trainer.initial, half)
  assert sums['images'] == 3
  assert_close(trainer.evaluate(trainer.initial, noise)['loss'], sums['loss'], rtol=1e-6)
  rest, whole = (trainer.evaluate(trainer.initial, batch | {'mask': m}) for m in (1 - half['mask'], batch['mask']))
  for name in sums:
    assert_close(sums[name] + rest[name], whole[name], rtol=1e-5)  # sums, so that batches can be added up


def test_label_smoothing_is_that_of_pytorch():
  rng = np.random.default_rng(0)
  logits, tokens = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
  log_probs = logits - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
  target = 0.9 * np.eye(7)[tokens] + 0.1 / 7
  assert_close(generator_losses.token_losses(logits, tokens, 0.1), -(target * log_probs).sum(-1), rtol=1e-5)
  assert_close(generator_losses.token_losses(logits, tokens), -(np.eye(7)[tokens] * log_probs).sum(-1), rtol=1e-5)


def test_adversarial_pull_is_as_strong_as_its_weight_says():
  rng = np.random.default_rng(0)
  image, target, direction = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(3))
  image_loss = lambda x: (jnp.mean((x - target) ** 2), {'l2': 1.0})
  fool = lambda x: 7 * jnp.sum(direction * x)
  gradient, loss, _, adversarial, factor = tokenizer_losses.balanced(image_loss, fool, image, 0.4)
  plain, pull = 2 * (image - target) / image.size, 7 * direction
  assert_close(factor * np.linalg.norm(pull.ravel()), 0.4 * np.linalg.norm(plain.ravel()), rtol=1e-5)
  assert_close(gradient, plain + factor * pull, rtol=1e-5)
  assert_close(loss, image_loss(image)[0], rtol=1e-6)
  assert_close(adversarial, fool(image), rtol=1e-6)


def test_discriminator_starts_at_its_share_of_the_run():
  trainer = Trainer('tokenizer', **FULL)
  states = [(trainer.initial, None), *trainer.run(8)]
  for step, ((old, _), (new, metrics)) in enumerate(zip(states, states[1:])):
    moved = differing(new.extra['discriminator'], old.extra['discriminator'])
    assert np.isfinite(metrics['loss'])
    if step < 4:
      assert moved == [] and metrics['adversarial_factor'] == 0 and metrics['discriminator'] == 0
    else:
      assert moved and metrics['adversarial_factor'] > 0 and metrics['discriminator'] > 0
    assert differing(new.params, old.params)


def test_dead_codes_are_used_again_after_restart_checks():
  trainer = Trainer('tokenizer', **FULL)
  initial = far_codes(trainer.initial)
  once, twice = (state for state, _ in trainer.run(2, initial))
  assert np.all(once.params['quantizer']['codebook'][16:] == 1e3)  # one check without use is no death yet
  for params in (twice.params, twice.ema):
    assert np.abs(params['quantizer']['codebook']).max() < 100
  seen = trainer.evaluate(twice, some_batch(1))['counts_KxV'].sum(0)
  assert seen[16:].sum() > 0
  assert trainer.evaluate(initial, some_batch(1))['counts_KxV'].sum(0)[16:].sum() == 0


def test_unused_codes_stay_as_they_are_by_default():
  trainer = Trainer('tokenizer')
  initial = far_codes(trainer.initial)
  state, _ = trainer.run(3, initial)[-1]
  old, new = (s.params['quantizer']['codebook'] for s in (initial, state))
  assert old[16:].tobytes() == new[16:].tobytes() and np.any(old[:16] != new[:16])
  assert state.extra == {}


def far_codes(state):
  """A state whose codes from 16 on lie where no residual is."""
  codebook = np.concatenate([state.params['quantizer']['codebook'][:16], np.full((16, 8), 1e3, np.float32)])
  params = state.params | {'quantizer': state.params['quantizer'] | {'codebook': codebook}}
  return state.replace(params=params, ema=params)


@pytest.mark.parametrize('kind', STAGES)
def test_bfloat16_is_for_activations_alone(kind):
  coarse, fine = Trainer(kind, dtype='bfloat16'), Trainer(kind)
  (state, metrics), (_, exact) = coarse.run(1)[0], fine.run(1)[0]
  for name, x in (leaves(state.params) | leaves(state.ema) | leaves(moments(state, 'mu'))).items():
    assert x.dtype == np.float32, name
  assert np.isfinite(metrics['gradient_norm'])
  assert metrics['loss'] != exact['loss']  # it is computed otherwise
  np.testing.assert_allclose(metrics['loss'], exact['loss'], rtol=0.05)
  stage, variables = coarse.stage, {'params': coarse.initial.params}
  if kind == 'generator':
    teacher = jax.ShapeDtypeStruct((1, stage.generator.pyramid.length - 1, 8), jnp.float32)
    out = jax.eval_shape(stage.generator.apply, variables, jax.ShapeDtypeStruct((1,), jnp.int32), teacher)
  else:
    out = jax.eval_shape(stage.tokenizer.apply, variables, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
  assert {x.dtype for x in jax.tree.leaves(out)} <= {jnp.dtype('float32'), jnp.dtype('int32')}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def small_state(step=0, ema=True, frozen=None):
  adam = optax.adam(0.1)
  params = {'w': jnp.arange(8.0) + step, 'deep': {'b': jnp.full((2, 3), 0.1)}}
  state = TrainState.create(3, params, adam, ema=ema, extra={'idle': jnp.arange(4)}, frozen=frozen)
  state, _ = state.updated(jax.tree.map(jnp.cos, params), adam, ema_decay=0.5, extra={'idle': jnp.arange(4) + step})
  return state.replace(step=jnp.int32(step))


def saved(workdir, *steps, keep=5, **options):
  checkpoints = Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(small_state(step, **options), {'tokenizer': f'name{step}'})
  checkpoints.close()


def restored(workdir, sharding=None, **options):
  """(state or None, metadata, what was said)."""
  said = []
  checkpoints = Checkpoints(workdir, 5, said.append)
  try:
    out = checkpoints.restore(small_state(**options), sharding or mesh_lib.replicated(mesh_lib.make_mesh()))
  finally:
    checkpoints.close()
  return *(out or (None, None)), said


def one_device():
  return mesh_lib.replicated(mesh_lib.make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize('ema', [True, False])
def test_checkpoint_gives_back_every_bit_but_what_is_frozen(tmp_path, ema):
  frozen = {'teacher': jnp.asarray(np.random.default_rng(0).normal(size=500_000), jnp.float32)}
  saved(tmp_path, 7, ema=ema, frozen=frozen)
  state, metadata, said = restored(tmp_path, ema=ema, frozen=frozen)
  assert differing(state, small_state(7, ema=ema, frozen=frozen)) == [] and said == []
  assert state.frozen['teacher'] is frozen['teacher'] and metadata['tokenizer'] == 'name7'
  assert (state.ema is None) == (not ema)
  assert sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file()) < 500_000


def test_no_checkpoint_is_no_error(tmp_path):
  assert restored(tmp_path) == (None, None, [])


def test_model_of_a_checkpoint_is_what_evaluation_uses(tmp_path):
  state = small_state(7)
  saved(tmp_path, 7)
  checkpoints = Checkpoints(tmp_path)
  params, step, metadata = checkpoints.restore_model(state.params, one_device())
  checkpoints.close()
  assert differing(params, state.ema) == [] and differing(params, state.params)
  assert step == 7 and metadata['tokenizer'] == 'name7'


def test_checkpoint_of_eight_devices_opens_on_one(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(mesh_lib.put_state(small_state(3), mesh_lib.make_mesh()), {})
  checkpoints.close()
  state, *_ = restored(tmp_path, one_device())
  assert differing(state, small_state(3)) == []
  assert {x.sharding.num_devices for x in jax.tree.leaves(state.params)} == {1}
  saved(tmp_path, 4)
  state, *_ = restored(tmp_path)
  assert {x.sharding.num_devices for x in jax.tree.leaves(state.params)} == {8}


def test_newest_checkpoints_are_kept(tmp_path):
  saved(tmp_path, 1, 2, 3, 4, keep=2)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']
  saved(tmp_path, 4, keep=2)  # once more: nothing to do
  assert differing(restored(tmp_path)[0], small_state(4)) == []


def truncate(folder):
  for file in folder.rglob('*'):
    if file.is_file():
      with file.open('r+b') as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_values(folder):
  """Spoils the bytes of the arrays, not their number."""
  for file in folder.rglob('d/*'):
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


def remove(pattern):
  def damage(folder):
    files = [file for file in folder.rglob(pattern) if file.is_file()]
    assert files
    for file in files:
      file.unlink()
  return damage


def empty(folder):
  for path in sorted(folder.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()


DAMAGES = [truncate, flip_values, remove('manifest.ocdbt'), remove('_METADATA'), remove('d/*'), empty]
NAMES = ['truncated', 'spoiled', 'without_manifest', 'without_metadata', 'without_data', 'empty']


@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_passed_over_and_said(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(2)) == [] and metadata['tokenizer'] == 'name2'
  if damage is not empty:
    assert 'checkpoint 4' in said[0] and 'cannot be read' in said[0] and 'using checkpoint 2' in said[1]
  assert all('\n' not in line for line in said)
  checkpoints = Checkpoints(tmp_path, say=said.append)
  params, step, _ = checkpoints.restore_model(small_state().params, one_device())
  checkpoints.close()
  assert step == 2 and differing(params, small_state(2).ema) == []


@pytest.mark.parametrize('damage', DAMAGES, ids=NAMES)
def test_unreadable_checkpoint_is_replaced_when_its_step_comes_again(tmp_path, damage):
  saved(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  checkpoints = Checkpoints(tmp_path, say=lambda text: None)
  checkpoints.restore(small_state(), one_device())
  checkpoints.save(small_state(4), {'tokenizer': 'again'})
  checkpoints.close()
  state, metadata, said = restored(tmp_path)
  assert differing(state, small_state(4)) == [] and metadata['tokenizer'] == 'again' and said == []


def test_checkpoints_none_of_which_can_be_read_are_an_error(tmp_path):
  saved(tmp_path, 2, 4)
  for step in (2, 4):
    truncate(tmp_path / 'checkpoints' / str(step))
  with pytest.raises(UserError, match=r'none of the checkpoints \[2, 4\].*restore them') as error:
    restored(tmp_path)
  assert '\n' not in str(error.value)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']  # nothing was cleared away


def test_stray_files_and_half_written_folders_are_no_checkpoints(tmp_path):
  saved(tmp_path, 2)
  folder = tmp_path / 'checkpoints'
  (folder / '4.orbax-checkpoint-tmp' / 'model').mkdir(parents=True)
  (folder / '6').mkdir()
  (folder / 'notes.txt').write_text('mine')
  (folder / 'backup').mkdir()
  state, _, _ = restored(tmp_path)
  assert state.step == 2
  saved(tmp_path, 3)
  assert restored(tmp_path)[0].step == 3
  assert (folder / 'notes.txt').read_text() == 'mine' and (folder / 'backup').is_dir()


def test_checkpoint_with_other_shapes_is_not_taken_for_this_model(tmp_path):
  saved(tmp_path, 2)
  checkpoints = Checkpoints(tmp_path, say=lambda text: None)
  with pytest.raises(UserError):
    checkpoints.restore_model({'w': jnp.zeros(9), 'deep': {'b': jnp.zeros((2, 3))}}, one_device())
  checkpoints.close()


# --- runs that are stopped and go on ---------------------------------------------------------------------------------


class Crash(Exception):
  """The machine went away."""


class CrashingCheckpoints(Checkpoints):
  """Checkpoints of a run that dies right after it has saved step 4."""

  def save(self, state, metadata):
    super().save(state, metadata)
    if int(state.step) == 4:
      raise Crash


def run_losses(workdir):
  return [(line['step'], line['train/loss']) for line in metrics_of(workdir) if 'train/loss' in line]


@pytest.mark.parametrize('kind', STAGES)
def test_resumed_run_equals_straight_run(kind, tmp_path, monkeypatch):
  changes = FULL if kind == 'tokenizer' else {}
  stage, first = Trainer(kind, **changes).stage, jax.devices()[:1]
  sources = [open_source('digits', split=split) for split in ('train', 'validation')]
  monkeypatch.setattr(jax, 'devices', lambda *_: first)  # eight would take longer to save, and prove no more

  def run(workdir, kind_of_checkpoints=Checkpoints):
    checkpoints, said = kind_of_checkpoints(workdir), []
    try:
      state = loop.train(stage, tiny_config(kind, **changes), *sources, checkpoints, workdir, say=said.append)
      return jax.device_get(state), said
    finally:
      checkpoints.close()

  straight, said = run(tmp_path / 'a')
  assert said == []
  with pytest.raises(Crash):
    run(tmp_path / 'b', CrashingCheckpoints)
  resumed, said = run(tmp_path / 'b')
  assert said == ['resuming from step 4 of 8']
  assert differing(resumed.replace(frozen=None), straight.replace(frozen=None)) == []
  assert resumed.step == 8 and differing(resumed.params, stage.init().params)
  assert [step for step, _ in run_losses(tmp_path / 'a')] == list(range(1, 9))
  assert run_losses(tmp_path / 'a') == run_losses(tmp_path / 'b')


def test_finished_run_is_left_as_it_is(tmp_path):
  first, _ = train_line(Line(6), tmp_path)
  lines = metrics_of(tmp_path)
  second, said = train_line(Line(6), tmp_path)
  assert said == ['resuming from step 6 of 6'] and differing(first, second) == []
  assert metrics_of(tmp_path) == lines


def test_metrics_of_a_lost_stretch_are_dropped(tmp_path):
  with pytest.raises(Crash):
    train_line(Line(6), tmp_path, CrashingCheckpoints(tmp_path))
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "train/loss": 99.0}\n{"step": 6, "tra')  # and a line cut short
  train_line(Line(6), tmp_path)
  assert [step for step, _ in run_losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert all(loss != 99 for _, loss in run_losses(tmp_path))


@pytest.fixture
def start(experiment):
  """Starts `python -m var_jax train` on a tokenizer in a process of its own, with one device."""
  processes = []

  def start(workdir):
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    processes.append(subprocess.Popen(
        [sys.executable, '-m', 'var_jax', 'train', f'--config={experiment}:tokenizer', f'--workdir={workdir}',
         '--config.steps=40', '--config.checkpoint_every=10'], stderr=subprocess.PIPE, text=True, env=environment))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()


def saved_steps(workdir):
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def stop_after(process, workdir, step, number):
  """(exit status, stderr) of a process that gets a signal once it has saved a step."""
  until = time.monotonic() + 120
  while max(saved_steps(workdir), default=0) < step and process.poll() is None and time.monotonic() < until:
    time.sleep(0.005)
  process.send_signal(number)
  errors = process.communicate(timeout=60)[1]
  return process.returncode, errors


def state_of(workdir):
  """The final state in a workdir."""
  checkpoints = Checkpoints(workdir)
  state, _ = checkpoints.restore(_stage('tokenizer', ()).init(), one_device())
  checkpoints.close()
  return state


def test_killed_run_equals_straight_run(start, tmp_path):
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  errors = start(straight).communicate(timeout=180)[1]
  assert saved_steps(straight)[-1] == 40, errors
  status, errors = stop_after(start(killed), killed, 10, signal.SIGKILL)
  assert status == -signal.SIGKILL and 10 in saved_steps(killed), errors
  for number, step, expected in ((signal.SIGTERM, 20, 143), (signal.SIGINT, 30, 130)):
    status, errors = stop_after(start(killed), killed, step, number)
    assert status == expected, errors
    stopped = int(re.search(r'stopped at step (\d+) and saved; the same command goes on from there', errors)[1])
    assert step <= stopped < 40 and saved_steps(killed)[-1] == stopped and 'Traceback' not in errors
  errors = start(killed).communicate(timeout=180)[1]
  assert f'resuming from step {stopped} of 40' in errors and f'trained to step 40: {killed}' in errors
  assert run_losses(killed) == run_losses(straight) and len(run_losses(straight)) == 40
  assert differing(state_of(killed), state_of(straight)) == []


def test_second_interrupt_stops_at_once(tmp_path):
  stage = Line(1000)

  def interrupt(state, batch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return {}

  stage.pictures = interrupt
  with pytest.raises(KeyboardInterrupt):
    train_line(stage, tmp_path, pictures_every=2)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
