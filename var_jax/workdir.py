"""Workdirs: `config.json`, `checkpoints/` and, in a generator's, a copy of its tokenizer. The one way to load a model."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from var_jax.errors import UserError
from var_jax.generator.transformer import Generator
from var_jax.pyramid import Pyramid
from var_jax.tokenizer.tokenizer import Tokenizer
from var_jax.training.checkpoint import Checkpoints

RUN_ONLY = ('log_every', 'eval_every', 'eval_images', 'pictures_every', 'checkpoint_every', 'keep', 'steps', 'epochs',
            'max_skipped_in_row', 'data.workers', 'data.path', 'tokenizer')  # free to change when a run is resumed


def fingerprint(params):
  """12 hexadecimal digits that name a set of parameters: a hash over paths, types, shapes and values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    array = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:12]


def read_config(workdir):
  """The locked config of a workdir. UserError when there is none."""
  path = pathlib.Path(workdir) / 'config.json'
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text())).lock()
  except FileNotFoundError:
    raise UserError(f'{workdir} is not a workdir, it has no config.json: give the --workdir of a training run') from None
  except ValueError as error:
    raise UserError(f'{path} cannot be read ({error}): restore it from a copy') from None


def write_config(workdir, config):
  """Writes config.json. UserError when the workdir holds a run with other settings that matter."""
  path = pathlib.Path(workdir) / 'config.json'
  if path.exists():
    old, new = _flat(read_config(workdir).to_dict()), _flat(json.loads(config.to_json()))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k not in RUN_ONLY)
    if changed:
      name = changed[0]
      raise UserError(
          f'{workdir} holds a run with other settings ({", ".join(changed[:4])}; {name} is {old.get(name)!r} there, '
          f'{new.get(name)!r} here): use another --workdir, or the same settings')
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(json.loads(config.to_json()), indent=2) + '\n')
  temporary.replace(path)


def _flat(tree, prefix=''):
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  return {name: value for key, item in tree.items() for name, value in _flat(item, f'{prefix}{key}.').items()}


def activation_dtype(config):
  """The config's dtype of activations."""
  if config.dtype not in ('float32', 'bfloat16'):
    raise UserError(f'dtype {config.dtype!r} is not supported: use float32 or bfloat16')
  return jnp.dtype(config.dtype)


def make_tokenizer(config):
  """The `Tokenizer` of a tokenizer's config. UserError when the scales do not end in the latent's size."""
  fields = dict(config.model)
  fields['ch_mult'] = tuple(fields['ch_mult'])
  tokenizer = Tokenizer(Pyramid.of(fields.pop('scales')), **fields, dtype=activation_dtype(config))
  if tokenizer.image_size != tuple(config.image_size):
    height, width = (side / tokenizer.stride for side in config.image_size)
    raise UserError(
        f'the last scale is {tokenizer.pyramid.last[0]}x{tokenizer.pyramid.last[1]}, but images of '
        f'{config.image_size[0]}x{config.image_size[1]} pixels have a latent of {height:g}x{width:g}: change '
        'model.scales, model.ch_mult or image_size')
  return tokenizer


def make_generator(config, tokenizer):
  """The `Generator` of a generator's config, on a tokenizer's tokens."""
  fields = dict(config.model)
  depth = fields['depth']
  width, heads = fields['width'] or 64 * depth, fields['heads'] or depth
  if width % heads:
    raise UserError(f'model.width {width} is not a multiple of model.heads {heads}: change one of them')
  return Generator(
      tokenizer.pyramid, tokenizer.codes, tokenizer.channels, **fields, dtype=activation_dtype(config))


def _shapes(module, *inputs):
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']


def load_tokenizer(workdir, say=print):
  """(Tokenizer, parameters) of a tokenizer's workdir, or of the copy in a generator's."""
  config = read_config(workdir)
  if config.stage == 'generator':
    return load_tokenizer(pathlib.Path(workdir) / 'tokenizer', say)
  tokenizer = make_tokenizer(config)
  shapes = _shapes(tokenizer, jax.ShapeDtypeStruct((1, *tokenizer.image_size, 3), jnp.float32))
  return tokenizer, _load_params(workdir, shapes, say)[0]


def load_generator(workdir, say=print):
  """(Generator, parameters, Tokenizer, its parameters). UserError when the tokenizer is not the one trained with."""
  config = read_config(workdir)
  if config.stage != 'generator':
    raise UserError(f'{workdir} holds a tokenizer: give the workdir of a generator')
  tokenizer, tokenizer_params = load_tokenizer(workdir, say)
  generator = make_generator(config, tokenizer)
  teacher = (1, generator.pyramid.length - generator.pyramid.sizes[0], generator.channels)
  shapes = _shapes(generator, jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct(teacher, jnp.float32))
  params, metadata = _load_params(workdir, shapes, say)
  found = fingerprint(tokenizer_params)
  if metadata.get('tokenizer') != found:
    raise UserError(
        f'the tokenizer in {workdir}/tokenizer is not the one that this generator was trained with (fingerprint '
        f'{found}, wanted {metadata.get("tokenizer")}): restore that folder from the workdir it was trained with')
  return generator, params, tokenizer, tokenizer_params


def _load_params(workdir, shapes, say):
  if not (pathlib.Path(workdir) / 'checkpoints').is_dir():
    raise UserError(f'{workdir} has no checkpoint yet: train it first, or wait for its first one')
  checkpoints = Checkpoints(workdir, say=say)
  try:
    params, _, metadata = checkpoints.restore_model(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  finally:
    checkpoints.close()
  return params, metadata


def adopt_tokenizer(workdir, source, say=print):
  """Puts a copy of a tokenizer into a generator's workdir, at its first start; (Tokenizer, parameters, fingerprint).

  source: the tokenizer's workdir; may be '' once the copy is there. UserError when it is another than the copy.
  """
  copy = pathlib.Path(workdir) / 'tokenizer'
  if not source and not copy.exists():
    raise UserError('a generator needs a tokenizer: add --config.tokenizer=DIR, the workdir of a trained one')
  if not (copy / 'config.json').exists():
    tokenizer, params = load_tokenizer(source, say)
    checkpoints = Checkpoints(copy, say=say)
    checkpoints.save_model(0, params, {})
    checkpoints.close()
    write_config(copy, read_config(source) if read_config(source).stage == 'tokenizer' else read_config(
        pathlib.Path(source) / 'tokenizer'))
    return tokenizer, params, fingerprint(params)
  tokenizer, params = load_tokenizer(copy, say)
  name = fingerprint(params)
  if source and pathlib.Path(source).exists():
    other = fingerprint(load_tokenizer(source, say)[1])
    if other != name:
      raise UserError(
          f'the tokenizer in {source} has other parameters than this generator expects (fingerprint {other}, wanted '
          f'{name}): point --config.tokenizer at the workdir it was trained with, or use another --workdir')
  return tokenizer, params, name
