"""The models behind the golden numbers, with the formula's weights: shared by the tests."""

import functools

import golden_files
import jax
import jax.numpy as jnp

from var_jax import workdir
from var_jax.generator.transformer import Generator
from var_jax.interop import published
from var_jax.pyramid import Pyramid
from var_jax.tokenizer.tokenizer import Tokenizer


@functools.cache
def tokenizer():
  """(Tokenizer, params) of the manifest's `vae`."""
  config, tensors = golden_files.weights('vae')
  pyramid = Pyramid.of(config['patch_nums'])
  model = Tokenizer(pyramid, config['vocab_size'], config['z_channels'], config['ch'], tuple(config['ch_mult']))
  shapes = workdir.tokenizer_shapes(model)
  params = published.from_published(tensors, published.tokenizer_names(shapes), shapes)
  return model, jax.tree.map(jnp.asarray, params)


@functools.cache
def generator(name='var'):
  """(Generator, params) of the manifest's `var`, `var_shared_adaln` or `var_scaled_dot`."""
  config, tensors = golden_files.weights(name)
  pyramid = Pyramid.of(config['patch_nums'])
  model = Generator(
      pyramid, 64, 16, config['num_classes'], config['depth'], config['embed_dim'], config['num_heads'],
      normalize_qk=config['attn_l2_norm'], shared_adaln=config['shared_aln'])
  shapes = workdir.generator_shapes(model)
  params = published.from_published(tensors, published.generator_names(shapes), shapes)
  return model, jax.tree.map(jnp.asarray, params)


def tokens(arrays, prefix='tokens'):
  """The golden tokens of all scales as (B, L)."""
  count = sum(1 for key in arrays if key.startswith(f'{prefix}_'))
  return jnp.concatenate([arrays[f'{prefix}_{k}'] for k in range(count)], axis=1)


def nhwc(x):
  return x.transpose(0, 2, 3, 1)
