"""The stages' steps: averages, accumulation, devices, and what a loss is made of."""


import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import assert_close
from tiny_runs import CERTAIN, FULL, Trainer, differing, farthest, leaves, moments, some_batch

from var_jax import flops
from var_jax.errors import UserError
from var_jax.generator import losses as generator_losses
from var_jax.pyramid import Pyramid
from var_jax.tokenizer import losses as tokenizer_losses
from var_jax.tokenizer.quantizer import MultiScaleQuantizer
from var_jax.training import mesh as mesh_lib
from var_jax.training import optimizer as optimizer_lib
from var_jax.training.state import TrainState, accumulated


@pytest.mark.parametrize('kind', [pytest.param('tokenizer', marks=pytest.mark.slow), 'generator'])
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


@pytest.mark.parametrize('kind, mesh', [
    ('generator', (8, 1, 1)), ('generator', (2, 2, 2)),
    pytest.param('tokenizer', (1, 8, 1), marks=pytest.mark.slow),
    pytest.param('tokenizer', (8, 1, 1), marks=pytest.mark.slow),
    pytest.param('generator', (1, 8, 1), marks=pytest.mark.slow),
    pytest.param('generator', (4, 1, 2), marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(kind, mesh):
  one, eight = Trainer(kind), Trainer(kind, mesh)
  clear, state = jax.tree.map(lambda p: True, one.initial.params), one.initial
  for step in range(2):
    (a, a_metrics), (b, b_metrics) = (trainer.step(state, some_batch(step)) for trainer in (one, eight))
    state = a
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


@pytest.mark.parametrize('kind, remat', [
    ('generator', 'dots'), ('generator', 'pointwise'), pytest.param('tokenizer', 'all', marks=pytest.mark.slow)])
def test_rematerialization_computes_more_and_gives_the_same(kind, remat):
  """But 'pointwise' computes no product again."""
  products = lambda trainer: len(re.findall(
      r'stablehlo\.(dot_general|convolution)', trainer.step.lowered(trainer.initial, some_batch()).as_text()))
  plain, trainer = Trainer(kind), Trainer(kind, remat=remat)
  (state, metrics), = plain.run(1)
  (again, again_metrics), = trainer.run(1)
  assert (products(trainer) == products(plain)) == (remat == 'pointwise') and products(trainer) >= products(plain)
  assert_close(again_metrics['loss'], metrics['loss'], rtol=1e-6)
  assert farthest(moments(again, 'mu'), moments(state, 'mu')) < 1e-6


def test_deeper_network_is_no_longer_program():
  """Blocks are scanned, but on a single CPU: else thirty of them would take fifteen times as long as two to compile."""
  lines = []
  for depth in (2, 5):
    trainer = Trainer('generator', mesh=(2, 1, 1), **{'model.depth': depth})
    lines.append(trainer.step.lowered(trainer.initial, some_batch()).as_text().count('\n'))
  assert abs(lines[1] - lines[0]) < 20 and lines[0] > 1000, lines  # a helper may be shared or not


@pytest.mark.parametrize('kind, mesh', [
    pytest.param('tokenizer', (1, 8, 1), marks=pytest.mark.slow), ('generator', (2, 2, 2))])
def test_twenty_steps_on_eight_devices_are_those_of_one(kind, mesh):
  for (_, a), (_, b) in zip(Trainer(kind).run(20), Trainer(kind, mesh).run(20), strict=True):
    assert_close(b['loss'], a['loss'], rtol=1e-5)
    assert_close(b['gradient_norm'], a['gradient_norm'], rtol=1e-5)


def test_batch_that_devices_cannot_share_is_refused():
  mesh = mesh_lib.make_mesh()
  mesh_lib.check_batch(32, mesh, 4)
  for size, parts in ((12, 1), (8, 2), (4, 1)):
    with pytest.raises(UserError, match=f'batch_size {size} cannot be shared by 8 devices'):
      mesh_lib.check_batch(size, mesh, parts)




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


@pytest.mark.slow
def test_scales_that_weigh_nothing_are_not_computed():
  """And the step is that of all scales, masked: losses, gradients, but for rounding."""
  changes = {'progressive.end': 0.9, 'progressive.start_scale': 0, 'progressive.ramp': 0.5, 'scale_weights.sigma': 1.0}
  trainer = Trainer('generator', **changes)
  stage, state, batch = trainer.stage, trainer.initial, some_batch()
  pyramid = stage.generator.pyramid
  phases = [stage.phase(step) for step in range(8)]
  assert phases == sorted(phases) and set(phases) == {1, 2, 3}
  for step, scales in enumerate(phases):
    settings = dict(start_scale=0, end=0.9, warmup=0, ramp=4)
    weights = generator_losses.progressive_weights(step, stage.steps, pyramid, **settings)
    assert np.sum(weights > 0) == sum(pyramid.sizes[:scales])
  step = phases.index(2)
  state = state.replace(step=np.int32(step))
  expected, metrics = trainer.step(state, batch)
  found, fewer = jax.jit(stage.train_step, static_argnames='phase')(state, batch, phase=2)
  for name in ('gradient_norm', 'loss/scale_0', 'loss/scale_1', 'accuracy/scale_1'):
    assert_close(fewer[name], metrics[name], rtol=1e-5)
  assert metrics.keys() - fewer.keys() == {'loss/scale_2', 'accuracy/scale_2', 'loss/last', 'accuracy/last'}
  assert farthest(moments(found, 'mu'), moments(expected, 'mu')) < 1e-5
  costs = [flops.counted(functools.partial(stage.train_step, phase=phase), state, batch) for phase in (1, 2, 3)]
  assert costs[0] < costs[1] < costs[2]


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
  fool = lambda x: 7 * jnp.sum(direction * x)
  plain, pull = 2 * (image - target) / image.size, 7 * direction
  gradient, adversarial, factor = tokenizer_losses.balanced(plain, fool, image, 0.4)
  assert_close(factor * np.linalg.norm(pull.ravel()), 0.4 * np.linalg.norm(plain.ravel()), rtol=1e-5)
  assert_close(gradient, plain + factor * pull, rtol=1e-5)
  assert_close(adversarial, fool(image), rtol=1e-6)


@pytest.mark.slow
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


def test_discriminator_follows_the_runs_schedule_and_counts_from_its_own_start():
  """Adam's first step is as long as its rate. The run warms up for two steps, the discriminator for its own two."""
  changes = {'optimizer.warmup': 0.25, 'optimizer.schedule': 'cos', 'loss.discriminator_lr': 1e-2}
  trainer = Trainer('tokenizer', **FULL | changes)
  states = [trainer.initial, *(state for state, _ in trainer.run(8))]
  counts = [int(optax.tree.get(state.extra['discriminator_optimizer'], 'count')) for state in states]
  assert counts == [0, 0, 0, 0, 0, 1, 2, 3, 4]
  moved = [farthest_move(a.extra['discriminator'], b.extra['discriminator']) for a, b in zip(states, states[1:])]
  run = optimizer_lib.learning_rate('cos', 1e-2, 8, 2)
  np.testing.assert_allclose(moved[4], 0.005 * run(4), rtol=1e-3)
  assert 0.3 * run(5) < moved[5] < run(5)  # half-way through its warm-up
  assert moved[7] < 1.5 * run(7) < 0.2 * 1e-2


def farthest_move(a, b):
  return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


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


def test_codes_that_any_step_uses_are_not_restarted():
  """Two batches in turn, of which the checks, every other step, fall on the second alone."""
  trainer = Trainer('tokenizer', **{
      'codebook.restart_every': 2, 'codebook.restart_after': 2, 'optimizer.peak_lr': 1e-12, 'ema': 0.0})
  state = far_codes(trainer.initial).replace(ema=None)
  batches = some_batch(), some_batch() | {'image': np.ones((8, 8, 8, 3), np.float32)}
  used = [trainer.evaluate(state, batch)['counts_KxV'].sum(0) > 0 for batch in batches]
  first_alone = used[0] & ~used[1]
  assert first_alone.sum() > 3
  codebooks = []
  for step in range(4):
    state, _ = trainer.step(state, batches[step % 2])
    codebooks.append(state.params['quantizer']['codebook'])
  np.testing.assert_array_equal(codebooks[2][16:], 1e3)  # unused in three steps is no death yet
  assert np.abs(codebooks[3]).max() < 100
  np.testing.assert_allclose(codebooks[3][first_alone], codebooks[0][first_alone], atol=1e-6)


@pytest.mark.slow
def test_small_batches_do_not_make_codes_die():
  """Two steps of 21 tokens say nothing of 32 codes: no code is restarted before each was due eight times."""
  trainer = Trainer('tokenizer', **FULL)
  one = {name: x[:1] for name, x in some_batch().items()}
  state = far_codes(trainer.initial)
  for step in range(13):
    assert np.all(state.params['quantizer']['codebook'][16:] == 1e3), step
    state, _ = trainer.step(state, one)
  assert np.abs(state.params['quantizer']['codebook']).max() < 100


def test_restarting_codes_takes_no_more_images_at_a_time_than_the_step():
  trainer = Trainer('tokenizer', accumulate=4, **{'codebook.restart_every': 1})
  text = trainer.step.lowered(trainer.initial, some_batch()).as_text()
  images = re.findall(r'stablehlo.convolution.*? : \(tensor<(\d+)x8x8x3x', text)
  assert images and set(images) == {'2'}, images


def test_dropping_scales_brings_no_images_together():
  """What crosses devices are the sums of the losses, single numbers."""
  pyramid, mesh = Pyramid.of((1, 2, 4)), mesh_lib.make_mesh()
  quantizer = MultiScaleQuantizer(pyramid, codes=32, channels=8)
  latent, kept_B = jax.random.normal(jax.random.key(0), (16, 4, 4, 8)), jnp.arange(16) % 3 + 1
  variables = jax.jit(quantizer.init)(jax.random.key(1), latent)
  whole = jax.jit(quantizer.apply)(variables, latent, kept_B)
  sums = jnp.stack(jax.jit(functools.partial(quantizer.apply, method='partial_sums'))(variables, whole.tokens_BxL))
  np.testing.assert_allclose(whole.latent_BxHxWxC, sums[kept_B - 1, np.arange(16)], atol=1e-6)
  with jax.set_mesh(mesh):
    split = jax.device_put((latent, kept_B), mesh_lib.split(mesh))
    compiled = jax.jit(quantizer.apply).lower(variables, *split).compile()
  found = re.findall(r' = (.*?) (all-[\w-]+|reduce-scatter|collective-permute)\(', compiled.as_text())
  assert all(kind == 'all-reduce' and not re.search(r'\[\d', shape) for shape, kind in found), found


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


@pytest.mark.parametrize('kind', [pytest.param('tokenizer', marks=pytest.mark.slow), 'generator'])
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


@pytest.mark.parametrize('kind, mesh, changes', [
    ('generator', (2, 2, 2), {}),
    pytest.param('generator', (2, 4, 1), {'model.shared_adaln': True}, marks=pytest.mark.slow),
    pytest.param('tokenizer', (2, 4, 1), {'loss.adversarial': 0.5, 'loss.adversarial_start': 0.0},
                 marks=pytest.mark.slow)])
def test_sums_over_devices_are_float32_whatever_the_dtype(kind, mesh, changes, tmp_path):
  """As XLA has divided the program among devices: a CPU's compiler makes float32 of bfloat16 in a later pass."""
  trainer = Trainer(kind, mesh, dtype='bfloat16', **changes)
  trainer.step.lowered(trainer.initial, some_batch()).compile(
      {'xla_dump_to': str(tmp_path), 'xla_dump_hlo_pass_re': 'spmd-partitioning'})
  text = max(tmp_path.glob('*after_spmd-partitioning*'), key=lambda file: file.stat().st_size).read_text()
  sums = re.findall(r' = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(', text)
  assert ' bf16[' in text and len(sums) > 10
  assert [shape for shape in sums if 'bf16' in shape] == []
