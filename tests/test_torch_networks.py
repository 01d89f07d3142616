"""What launch/benchmark_torch.py times is the published computation, and ours: where PyTorch is installed."""

import sys

import golden_files
import jax
import numpy as np
import pytest
from golden_files import assert_close
from tiny_runs import EXPERIMENT, ROOT

from var_jax.interop import published
from var_jax.pyramid import Pyramid

torch = pytest.importorskip('torch')
sys.path.insert(0, str(ROOT / 'launch'))
import benchmark_torch  # noqa: E402
import torch_networks  # noqa: E402


def tensors(model):
  config, found = golden_files.weights(model)
  return Pyramid.of(config['patch_nums']), {name: torch.from_numpy(x) for name, x in found.items()}


@torch.inference_mode()
def test_tokenizer_finds_the_published_tokens_and_images():
  golden, (pyramid, w) = golden_files.load('vae'), tensors('vae')
  tokens = torch_networks.encode(w, torch.from_numpy(golden['image']), pyramid)
  for k, found in enumerate(tokens):
    np.testing.assert_array_equal(found, golden[f'tokens_{k}'])
  assert_close(torch_networks.decode(w, tokens, pyramid), golden['reconstruction'])


@torch.inference_mode()
def test_generator_has_the_published_logits_and_images():
  golden, teacher, (pyramid, w) = golden_files.load('var'), golden_files.load('vae')['var_input'], tensors('var')
  labels = torch.from_numpy(golden['labels'])
  assert_close(torch_networks.logits(w, labels, torch.from_numpy(teacher), pyramid), golden['logits'])
  logits, image = torch_networks.sample(w | tensors('vae')[1], labels, pyramid, cfg=1.5, top_k=1, top_p=0)
  for k, found in enumerate(logits):
    assert_close(found, golden[f'guided_logits_{k}'])
  assert_close((image + 1) / 2, golden['greedy_image'])


def test_filters_keep_what_the_published_ones_keep():
  golden = golden_files.load('sampling_filters')
  logits = torch.from_numpy(golden['logits'])
  for key in golden:
    if key.startswith('kept_'):
      top_k, top_p = key.removeprefix('kept_k').split('_p')
      kept = torch_networks.likely(logits, int(top_k), float(top_p)) > -torch.inf
      np.testing.assert_array_equal(kept, golden[key], err_msg=key)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  file = tmp_path_factory.mktemp('small') / 'small.py'
  file.write_text(EXPERIMENT.replace('ch=8, ch_mult', 'ch=32, ch_mult'))  # as many channels as groups of norms
  return str(file)


@torch.inference_mode()
def test_parameters_are_ours(small):
  _, generator, _, params = benchmark_torch.benchmark.generator_of(small, 2)
  w = benchmark_torch.tensors(params['generator'], published.generator_names(params['generator']))
  teacher = np.random.default_rng(0).standard_normal((2, generator.pyramid.length - 1, generator.channels), np.float32)
  labels = np.array([3, 0])
  ours = jax.jit(generator.apply)({'params': params['generator']}, labels, teacher)
  assert_close(torch_networks.logits(w, torch.from_numpy(labels), torch.from_numpy(teacher), generator.pyramid), ours)


@pytest.mark.parametrize('row, arguments', [
    ('encode', [2]), ('decode', [2]), ('sample', [2, 2]), ('generator_step', [2, 2])])
def test_rows_need_what_ours_need(small, row, arguments):
  call, images, operations = getattr(benchmark_torch, row)(*arguments, file=small)
  call()
  ours = getattr(benchmark_torch.benchmark, row)(*arguments, file=small)
  assert (images, operations) == (ours.images, ours.flops)
