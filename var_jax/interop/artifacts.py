"""What a server loads without this package: `jax.export` artifacts of sampling, encoding and decoding.

`FOLDER/sample.jaxexport`, `encode.jaxexport`, `decode.jaxexport` take any batch size; `about.json` says what they take
and give. Weights are inside of each, or beside them in `weights.npz`, whose arrays are then the first argument.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from var_jax.data.floats import floats
from var_jax.errors import UserError
from var_jax.generator import sampling

# The parts of a tokenizer that each artifact needs.
PARTS = {'encode': ('encoder', 'quant_conv', 'quantizer'), 'decode': ('quantizer', 'post_quant_conv', 'decoder'),
         'sample': ('quantizer', 'post_quant_conv', 'decoder')}
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
MOST_INSIDE = 2**30  # bytes of weights; the artifact's container ends at twice that


def functions(model, choices):
  """{name: (function of (params, …), specifications of its inputs, what it does)} of a `Model`.

  choices: `sampling.Choices` of the artifact; its cfg is an input instead.
  """
  tokenizer = model.tokenizer
  (b,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((b, *tokenizer.image_size, 3), jnp.uint8)
  tokens = jax.ShapeDtypeStruct((b, tokenizer.pyramid.length), jnp.int32)

  def encode(params, images):
    return tokenizer.apply({'params': params['tokenizer']}, floats(images), method='encode')

  def decode(params, tokens):
    return _to_uint8(tokenizer.apply({'params': params['tokenizer']}, tokens, method='decode'))

  def sample(params, labels, seed, cfg):
    keys = sampling.image_keys(seed, jnp.arange(labels.shape[0], dtype=jnp.uint32))
    generator = model.generator.clone(attention='xla')  # which every platform has
    drawn = sampling.sample(generator, tokenizer, params, labels, keys, choices._replace(cfg=cfg))
    return _to_uint8(drawn.image_BxHxWx3)

  found = {'encode': (encode, (images,), 'images (b, H, W, 3) uint8 -> tokens (b, L) int32'),
           'decode': (decode, (tokens,), 'tokens (b, L) int32 -> images (b, H, W, 3) uint8')}
  if model.generator is not None:
    inputs = (jax.ShapeDtypeStruct((b,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32),
              jax.ShapeDtypeStruct((), jnp.float32))
    text = 'labels (b,) int32, seed () uint32, cfg () float32 -> images (b, H, W, 3) uint8'
    found['sample'] = (sample, inputs, text)
  return found


def _to_uint8(images):
  return jnp.clip(jnp.rint((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def write(model, folder, platforms, choices, inside=True):
  """Writes the artifacts of a `Model` and `about.json` into a folder; returns the paths.

  platforms: of PLATFORMS. inside: whether each artifact holds its weights. UserError where they are too many for that.
  """
  size = sum(x.nbytes for x in jax.tree.leaves(model.params))
  if inside and size > MOST_INSIDE:
    raise UserError(f'the weights ({size / 2**30:.1f} GiB) do not fit into an artifact: use --weights=beside')
  folder, paths = pathlib.Path(folder), []
  about = {
      'platforms': list(platforms), 'weights': 'inside' if inside else 'weights.npz, the first argument',
      'image_size': model.tokenizer.image_size, 'scales': model.tokenizer.pyramid.scales,
      'classes': model.generator and model.generator.classes, 'class_names': model.class_names,
      'drawn_with': {name: value for name, value in choices._asdict().items() if name != 'cfg'}, 'artifacts': {}}
  for name, (function, inputs, text) in functions(model, choices).items():
    params = {'tokenizer': {part: model.params['tokenizer'][part] for part in PARTS[name]}}
    if name == 'sample':
      params['generator'] = model.params['generator']
    artifact = _exported(function, params if inside else model.params, inputs, platforms, inside)
    paths.append(folder / f'{name}.jaxexport')
    paths[-1].write_bytes(artifact.serialize())
    about['artifacts'][name] = text
  if not inside:
    paths.append(folder / 'weights.npz')
    np.savez(paths[-1], **flatten_dict(model.params, sep='/'))
  paths.append(folder / 'about.json')
  paths[-1].write_text(json.dumps(about, indent=2) + '\n')
  return paths


def _exported(function, params, inputs, platforms, inside):
  if inside:
    # Behind the barrier, the compiler does not compute with weights at compile time, which would round otherwise.
    whole = jax.jit(lambda *inputs: function(jax.lax.optimization_barrier(params), *inputs))
    return export.export(whole, platforms=platforms)(*inputs)
  whole = jax.jit(lambda flat, *inputs: function(unflatten_dict(flat, sep='/'), *inputs))
  flat = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flatten_dict(params, sep='/').items()}
  return export.export(whole, platforms=platforms)(flat, *inputs)
