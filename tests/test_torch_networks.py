"""What launch/benchmark_torch.py times is the published computation: golden numbers, where PyTorch is installed."""

import sys

import golden_files
import numpy as np
import pytest
from golden_files import assert_close
from tiny_runs import ROOT

from var_jax.pyramid import Pyramid

torch = pytest.importorskip('torch')
sys.path.insert(0, str(ROOT / 'launch'))
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
  """Of 400 draws from each row none is one that the golden filters leave out."""
  golden = golden_files.load('sampling_filters')
  logits = torch.from_numpy(golden['logits'])
  for key in golden:
    if key.startswith('kept_'):
      top_k, top_p = key.removeprefix('kept_k').split('_p')
      for _ in range(400):
        drawn = torch_networks.draw(logits, int(top_k), float(top_p))
        assert np.take_along_axis(golden[key], drawn[..., None].numpy(), -1).all(), key
