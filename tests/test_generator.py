"""Transformer, sampling and editing against the published implementation, and their invariants."""

import dataclasses
import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import published_models
import pytest
from golden_files import assert_close
from published_models import nhwc
from tiny_runs import optimizations

from var_jax import workdir
from var_jax.generator import attention, sampling
from var_jax.generator.sampling import Choices
from var_jax.generator.transformer import Generator
from var_jax.pyramid import Pyramid
from var_jax.training import mesh as mesh_lib

MODELS = ['var', 'var_shared_adaln', 'var_scaled_dot']


LIKELY = Choices(top_k=20, top_p=0.9)
GREEDY = Choices(top_k=1, top_p=0.0)


def sample(labels, choices=LIKELY, *, cfg=1.5, name='var', given=None, seed=0, image=True):
  """cfg: None leaves out the pass without class. Many share a program, since one takes seconds to compile.

  image: False leaves out the decoder, most of what is compiled.
  """
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(labels)))
  params = {'generator': published_models.generator(name)[1], 'tokenizer': published_models.tokenizer()[1]}
  return sampler(name, image)(params, jnp.asarray(labels), keys, choices, cfg, given)


@functools.cache
def sampler(name, image):
  generator, tokenizer = published_models.generator(name)[0], published_models.tokenizer()[0]

  def draw(params, labels, keys, choices, cfg, given):
    choices = choices._replace(cfg=0 if cfg is None else cfg)
    out = sampling.sample(generator, tokenizer, params, labels, keys, choices, given)
    return out if image else out._replace(image_BxHxWx3=None)

  return jax.jit(draw, static_argnums=3)


@pytest.mark.parametrize('name', MODELS)
def test_teacher_forced_logits_match_published_implementation(name):
  model, params = published_models.generator(name)
  golden, teacher = golden_files.load(name), golden_files.load('vae')['var_input']
  assert_close(jax.jit(model.apply)({'params': params}, golden['labels'], teacher), golden['logits'])


@pytest.mark.parametrize('name', MODELS)
def test_guided_greedy_sampling_matches_published_implementation(name):
  golden = golden_files.load(name)
  out = sample(golden['labels'], GREEDY, name=name)
  np.testing.assert_array_equal(out.tokens_BxL, published_models.tokens(golden, 'greedy_tokens'))
  for k, logits in enumerate(out.guided_logits):
    assert_close(logits, golden[f'guided_logits_{k}'])
  assert_close((out.image_BxHxWx3 + 1) / 2, nhwc(golden['greedy_image']))


@pytest.mark.parametrize('task', ['inpaint', 'outpaint', 'class_edit'])
def test_greedy_editing_matches_published_implementation(task):
  golden = {key.split('/')[1]: value for key, value in golden_files.load('edit').items() if key.startswith(task)}
  given = published_models.tokens(golden_files.load('vae'))
  keep = jnp.broadcast_to(golden['keep_mask'], (2, 4, 4))
  out = sample(golden['labels'], GREEDY, cfg=3.0, given=(given, keep))
  for k, drawn in enumerate(out.drawn_tokens):
    np.testing.assert_array_equal(drawn, golden[f'predicted_tokens_{k}'])
  assert_close((out.image_BxHxWx3 + 1) / 2, nhwc(golden['image']))


def test_filters_match_published_implementation():
  golden = golden_files.load('sampling_filters')
  for key in golden:
    if key.startswith('kept'):
      top_k, top_p = (part[1:] for part in key.split('_')[1:])
      kept = sampling.keep_likely(jnp.asarray(golden['logits']), int(top_k), float(top_p))
      np.testing.assert_array_equal(np.isfinite(kept), golden[key], err_msg=key)


@pytest.mark.parametrize('name', ['var', *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS[1:])])
def test_cached_sampling_equals_teacher_forcing(name):
  model, params = published_models.generator(name)
  tokenizer, tokenizer_params = published_models.tokenizer()
  labels = jnp.array([3, 5, 7, 9])
  out = sample(labels, cfg=None, name=name, image=False)
  teacher = tokenizer.apply({'params': tokenizer_params}, out.tokens_BxL, method='teacher_input')
  logits = jax.jit(model.apply)({'params': params}, labels, teacher)
  assert_close(jnp.concatenate(out.guided_logits, axis=1), logits, rtol=1e-5)
  with_both_halves = sample(labels, cfg=0.0, name=name, image=False)
  np.testing.assert_array_equal(with_both_halves.tokens_BxL, out.tokens_BxL)


def test_later_scales_have_no_gradient():
  model, params = published_models.generator()
  pyramid, first = model.pyramid, model.pyramid.sizes[0]
  teacher = jnp.asarray(golden_files.load('vae')['var_input'])

  @jax.jit
  def influences(teacher):
    logits, pull_back = jax.vjp(lambda t: model.apply({'params': params}, jnp.array([1, 2]), t), teacher)
    cotangents = [jnp.zeros_like(logits).at[:, s].set(jnp.cos(logits[:, s])) for s in pyramid.slices]
    return [jnp.abs(pull_back(c)[0]).sum(axis=(0, 2)) for c in cotangents]

  for k, (s, influence) in enumerate(zip(pyramid.slices, influences(teacher))):
    seen = slice(0, s.stop - first)
    assert np.all(influence[s.stop - first:] == 0), k
    assert np.all(influence[seen] > 0), k  # own and coarser scales are all seen, so tokens of one scale see each other


def test_same_seed_gives_same_tokens_whatever_the_batch():
  tokens = lambda labels, seed: sample(labels, seed=seed, image=False).tokens_BxL
  four = tokens([3, 5, 7, 9], 1)
  np.testing.assert_array_equal(four[:1], tokens([3], 1))
  np.testing.assert_array_equal(four[:3], tokens([3, 5, 7], 1))
  assert not np.array_equal(four, tokens([3, 5, 7, 9], 2))


def test_no_scale_copies_the_cache():
  model = Generator(Pyramid.of((1, 2)), codes=64, channels=16, classes=10, depth=2, width=128, heads=16)
  labels_B = jnp.zeros(32, jnp.int32)

  def draw(params):
    bound = model.bind({'params': params})
    _, cache = bound.next_scale(labels_B, 0, None, bound.empty_cache(32))
    return bound.next_scale(labels_B, 1, jnp.zeros((32, 4, 16)), cache)[0]

  with optimizations():
    program = jax.jit(draw).lower(workdir.generator_shapes(model)).compile().as_text()
  cache = re.escape('= f32[2,32,5,128]')
  copied = re.findall(rf'{cache}\S* copy\(', program)
  assert re.search(cache, program) and len(copied) <= 1, copied  # the zeros that keys and values both begin with


def test_smooth_sampling_mixes_codes():
  sharp, smooth = (sample([3, 5, 7, 9], LIKELY._replace(smooth=s)) for s in (False, True))
  assert np.all(np.isfinite(smooth.image_BxHxWx3))
  tokenizer, params = published_models.tokenizer()
  decode = jax.jit(lambda tokens: tokenizer.apply({'params': params}, tokens, method='decode'))
  decoded = decode(smooth.tokens_BxL)
  assert np.abs(decoded - smooth.image_BxHxWx3).max() > 1e-3  # the picture is not that of the hard tokens
  assert_close(decode(sharp.tokens_BxL), sharp.image_BxHxWx3)


SCALES = Pyramid.of((1, 2, 3, 5, 8, 9))


def queries_keys_values(dtype=jnp.float32):
  return [jax.random.normal(jax.random.key(i), (4, SCALES.length, 2, 16), dtype) for i in range(3)]


def with_gradients(attend):
  return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2)))(*queries_keys_values())


@pytest.mark.parametrize('heads, pyramid', [
    (1, SCALES), (2, dataclasses.replace(SCALES, markov=True)), (4, None)])  # None: every key is visible
def test_some_heads_at_a_time_equal_all(heads, pyramid, monkeypatch):
  attend = lambda q, k, v: attention.attend(q if pyramid else q[:, -SCALES.sizes[-1]:], k, v, pyramid, 'xla')
  expected = with_gradients(attend)
  pairs = [(end - start) * (end - first) for first, start, end in attention.query_ranges(pyramid or SCALES)]
  monkeypatch.setattr(attention, 'CPU_CACHE', heads * 32 * max(pairs))
  calls, real = [], attention._exponentials
  monkeypatch.setattr(attention, '_exponentials', lambda *x: calls.append(x[0].shape) or real(*x))
  found = with_gradients(attend)
  assert [shape[0] for shape in calls] == [heads] * (len(pairs) if pyramid else 1)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('sizes', [None, dict(fsdp=2, tensor=2), dict(tensor=8)])
def test_splash_attention_equals_xla(sizes):
  """Interpreted, since the kernel is for TPUs: its mask, its padding, and how devices share images and heads."""
  expected = with_gradients(lambda *x: attention.attend(*x, SCALES, 'xla'))
  splash = lambda *x: attention._splash(*x, SCALES, interpret=True)
  if sizes is None:
    found = with_gradients(splash)
  else:
    with jax.set_mesh(mesh_lib.make_mesh(**sizes)):
      found = with_gradients(splash)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_cudnn_attention_is_lowered_for_gpus(monkeypatch):
  """There is no GPU to run it on: a kernel for each range of queries but the coarsest, forwards and backwards."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda capability: True)
  monkeypatch.setattr(cudnn, 'is_cuda_compute_capability_equal', lambda capability: False)
  loss = lambda *x: jnp.sum(attention.attend(*x, SCALES, 'cudnn').astype(jnp.float32))
  text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*queries_keys_values(jnp.bfloat16)).lower(
      lowering_platforms=('cuda',)).as_text()
  kernels = len(attention.query_ranges(SCALES)) - 1
  assert kernels > 0 and text.count('@__cudnn$fmhaSoftmax(') == text.count('@__cudnn$fmhaSoftmaxBackward(') == kernels


def test_attention_suits_the_devices():
  """A kernel that the devices do not have would end the run."""
  assert attention.chosen('auto', jnp.bfloat16) == 'xla' and attention.chosen('splash', jnp.float32) == 'splash'
  cases = [('tpu', 'float32', 'splash'), ('gpu', 'bfloat16', 'cudnn'), ('gpu', 'float32', 'xla')]
  for platform, dtype, expected in cases:
    with pytest.MonkeyPatch.context() as there:
      there.setattr(attention.axes, 'platform', lambda: platform)
      assert attention.chosen('auto', jnp.dtype(dtype)) == expected


def test_float32_residual_brings_bfloat16_nearer_to_float32():
  model = Generator(Pyramid.of((1, 2, 3)), codes=64, channels=8, classes=3, depth=8, width=64, heads=4, adaln_gamma=1.0)
  inputs = jnp.arange(4) % 3, jax.random.normal(jax.random.key(1), (4, 13, 8))
  params = jax.jit(model.init)(jax.random.key(0), *inputs)
  logits = lambda **changes: np.asarray(jax.jit(model.clone(**changes).apply)(params, *inputs))
  exact = logits()
  np.testing.assert_array_equal(logits(float32_residual=True), exact)
  errors = [np.linalg.norm(logits(dtype=jnp.bfloat16, float32_residual=on) - exact) for on in (True, False)]
  assert 0 < errors[0] < 0.75 * errors[1], errors
