"""Resize, quantizer and autoencoder against the published implementation."""

import flax.linen as nn
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import published_models
import pytest
from golden_files import assert_close
from published_models import nhwc

from var_jax.errors import UserError
from var_jax.pyramid import Pyramid
from var_jax.tokenizer import resize
from var_jax.tokenizer.autoencoder import GroupNorm
from var_jax.tokenizer.quantizer import MultiScaleQuantizer


@pytest.mark.parametrize('size', [1, 2, 3, 5, 6, 10, 13])
def test_resize_matches_pytorch(size):
  golden = golden_files.load('resize')
  down = resize.area(nhwc(golden['x']), (size, size))
  assert_close(down, nhwc(golden[f'area_{size}']))
  assert_close(resize.bicubic(down, (16, 16)), nhwc(golden[f'bicubic_{size}']))


def quantizer(name):
  """(module, params, latent) of a golden quantizer; the phis' names differ with the way they are shared."""
  config, tensors = golden_files.weights(name)
  pyramid = Pyramid.of(config['patch_nums'])
  phi_layers = 0 if not config['quant_resi'] else config['share_quant_resi'] or len(pyramid)
  module = MultiScaleQuantizer(
      pyramid, 32, 8, phi_layers, config['quant_resi'], config['beta'], config['using_znorm'])
  prefix = {4: 'quant_resi.qresi_ls.{}', 1: 'quant_resi.qresi'}.get(config['share_quant_resi'], 'quant_resi.{}')
  params = {'codebook': tensors['embedding.weight']}
  for i in range(phi_layers):
    kernel, bias = (tensors[f'{prefix.format(i)}.{part}'] for part in ('weight', 'bias'))
    params[f'phi_{i}'] = {'kernel': kernel.transpose(2, 3, 1, 0), 'bias': bias}
  golden = golden_files.load(name)
  shape = golden[f'f_hat_{len(pyramid) - 1}'].shape
  latent = nhwc(2 * golden_files.uniform(f'{name}/latent', shape)).astype(np.float32)
  return module, params, latent, golden, prefix


QUANTIZERS = ['q_phi4', 'q_phi1', 'q_phi_each', 'q_znorm', 'q_nophi', 'q_nonsquare']


@pytest.mark.parametrize('name', QUANTIZERS)
def test_tokens_and_partial_sums_match_published_implementation(name):
  module, params, latent, golden, _ = quantizer(name)
  tokens = module.apply({'params': params}, latent, method='encode')
  np.testing.assert_array_equal(tokens, published_models.tokens(golden))
  for k, total in enumerate(module.apply({'params': params}, tokens, method='partial_sums')):
    assert_close(total, nhwc(golden[f'f_hat_{k}']))


@pytest.mark.parametrize('name', QUANTIZERS[:-1])
def test_quantizer_losses_gradients_and_teacher_input_match_published_implementation(name):
  module, params, latent, golden, prefix = quantizer(name)
  cotangent = nhwc(golden_files.uniform(f'{name}/cotangent', golden['f_hat'].shape))

  def objective(params, latent):
    out = module.apply({'params': params}, latent)
    return out.loss + 0.01 * jnp.sum(out.latent_BxHxWxC * cotangent), out

  grads, out = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, latent)
  assert_close(out.loss, golden['loss'])
  assert_close(out.latent_BxHxWxC, nhwc(golden['f_hat']))
  assert_close(grads[1], nhwc(golden['grad_latent']))
  assert_close(grads[0]['codebook'], golden['grad_embedding'])
  for i in range(module.phi_layers):
    assert_close(grads[0][f'phi_{i}']['kernel'], golden[f'grad/{prefix.format(i)}.weight'].transpose(2, 3, 1, 0))
    assert_close(grads[0][f'phi_{i}']['bias'], golden[f'grad/{prefix.format(i)}.bias'])
  teacher = module.apply({'params': params}, out.tokens_BxL, method='teacher_input')
  assert_close(teacher, golden['var_input'])


def test_autoencoder_matches_published_implementation():
  model, params = published_models.tokenizer()
  golden = golden_files.load('vae')
  one = lambda method, *args: model.apply({'params': params}, *args, method=method)
  apply = jax.jit(one, static_argnums=0)
  latent, tokens = jax.jit(lambda image: (one('latent', image), one('encode', image)))(nhwc(golden['image']))
  assert_close(latent, nhwc(golden['latent']))
  np.testing.assert_array_equal(tokens, published_models.tokens(golden))
  assert_close(apply('teacher_input', tokens), golden['var_input'])
  pictures = apply('decode_every_scale', tokens)
  assert_close(pictures[:, -1], nhwc(golden['reconstruction']))
  assert_close(pictures[:, 0], nhwc(golden['reconstruction_scale_0']))
  np.testing.assert_array_equal(apply('decode', tokens), pictures[:, -1])


def test_pyramid_that_does_not_end_in_the_latent_size_is_an_error():
  model, params = published_models.tokenizer()
  with pytest.raises(UserError, match='last scale is 4x4.*set the size to 64x64'):
    model.apply({'params': params}, jnp.zeros((1, 32, 32, 3)), method='encode')


@pytest.mark.parametrize('scales', [(), (0, 1), (2, 1), ((1, 2), (2, 1)), ('a',), (1, 2.5, 4), ((1, 1), (2.5, 2)),
                                    (1, (2, 2, 2)), (1, float('inf'))])
def test_senseless_scales_are_an_error(scales):
  with pytest.raises(UserError, match='scales must'):
    Pyramid.of(scales)


def test_group_norm_and_its_gradient_are_flax_s():
  """The mean is not followed through the variance, and sums go channel by channel: neither may change anything."""
  x, cotangent = np.random.default_rng(0).normal(2, 3, (2, 3, 4, 5, 12)).astype(np.float32)
  flax_s = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)
  params = {'scale': jnp.linspace(-1, 2, 12), 'bias': jnp.linspace(0, 1, 12)}
  run = lambda module: jax.vjp(lambda params, x: module.apply({'params': params}, x), params, x)
  (ours, back), (wanted, wanted_back) = run(GroupNorm(4)), run(flax_s)
  jax.tree.map(lambda found, desired: assert_close(found, desired, 1e-5),
               (ours, back(cotangent)), (wanted, wanted_back(cotangent)))
