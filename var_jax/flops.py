"""Floating-point operations that a model needs, by formula: what measured and compiled figures are compared with.

A multiplication and an addition are two operations. Only products with parameters and between queries, keys and values
count, and of the latter only the visible pairs; norms, softmax and resizing are left out.
"""

import math

import jax
import jax.numpy as jnp

from var_jax.tokenizer import convolution


def generator_forward(generator):
  """Of one image through a `Generator`, all scales: 24·D²·L + 4·D·pairs + 12·D² a block, and what lies around them.

  pairs: (query, key) that see each other: the sum over scales of size · (all tokens up to that scale), unless Markov.
  """
  D, L, N = generator.width or 64 * generator.depth, generator.pyramid.length, generator.depth
  pairs = int(generator.pyramid.visible_LxL.sum())
  mlp = round(D * generator.mlp_ratio)
  block = 2 * L * (4 * D * D + 2 * D * mlp) + 4 * D * pairs
  adaln = 12 * D * D if generator.shared_adaln else N * 12 * D * D
  embed = 2 * (L - generator.pyramid.sizes[0]) * generator.channels * D
  return N * block + adaln + embed + 4 * D * D + 2 * L * D * generator.codes


def counted(function, *arguments):
  """Of one call of a function: the products and convolutions in its jaxpr; of a condition the dearer branch.

  A convolution counts as it is written, where `tokenizer/convolution.py` needs fewer multiplications as well.
  """
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    inner = [p for value in equation.params.values() for p in (value if isinstance(value, (tuple, list)) else [value])
             if hasattr(p, 'eqns') or hasattr(p, 'jaxpr')]
    costs = [_of_jaxpr(getattr(p, 'jaxpr', p)) for p in inner]
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    times *= convolution.FEWER.get(equation.params.get('name'), 1)
    total += max(costs) if equation.primitive.name == 'cond' else times * sum(costs)
    out = [v.aval.shape for v in equation.outvars]
    if equation.primitive.name == 'dot_general':
      (lhs_axes, _), _ = equation.params['dimension_numbers']
      total += 2 * math.prod(out[0]) * math.prod(equation.invars[0].aval.shape[a] for a in lhs_axes)
    elif equation.primitive.name == 'conv_general_dilated':
      kernel, spec = equation.invars[1].aval.shape, equation.params['dimension_numbers'].rhs_spec
      total += 2 * math.prod(out[0]) * math.prod(kernel) // kernel[spec[0]]
  return total


def train_step(stage, state, batch):
  """Of one image in a stage's train_step. state, batch: arrays or their shapes.

  The generator's by formula: three times its forward pass, two of the model whose guidance it learns, and once what its
  frozen tokenizer does. A tokenizer's as its jaxpr has it.
  """
  images = len(next(iter(batch.values())))
  if stage.name != 'generator':
    return counted(stage.train_step, state, batch) / images
  frozen = counted(stage.encode_batch, state, batch) / images
  return frozen + (5 if stage.config.distill else 3) * generator_forward(stage.generator)


def sample(generator, tokenizer, tokenizer_params, passes=2):
  """Of one image that is drawn: passes through the generator, two with guidance, and one through the decoder."""
  tokens = jax.ShapeDtypeStruct((1, tokenizer.pyramid.length), jnp.int32)
  decode = lambda params, x: tokenizer.apply({'params': params}, x, method='decode')
  return passes * generator_forward(generator) + counted(decode, tokenizer_params, tokens)
