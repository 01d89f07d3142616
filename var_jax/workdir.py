"""Workdirs: `config.json`, `checkpoints/` and, in a generator's, its tokenizer's copy. The one way to load a model."""

import dataclasses
import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from var_jax import configs, whole
from var_jax.errors import UserError, note
from var_jax.generator.attention import IMPLEMENTATIONS
from var_jax.generator.transformer import Generator
from var_jax.lock import cannot_write
from var_jax.pyramid import Pyramid
from var_jax.remat import POLICIES
from var_jax.tokenizer.tokenizer import Tokenizer
from var_jax.training import processes
from var_jax.training.checkpoint import Checkpoints

RUN_ONLY = (  # free to change when a run is resumed
    'log_every', 'eval_every', 'eval_images', 'pictures_every', 'checkpoint_every', 'keep', 'keep_every', 'best',
    'steps', 'epochs', 'max_skipped_in_row', 'measure.every', 'measure.per_class', 'measure.inception',
    'measure.resize', 'measure.reference', 'sample.cfg', 'sample.top_k', 'sample.top_p', 'data.workers', 'data.threads',
    'data.path', 'tokenizer', 'start_from', 'loss.lpips_weights', 'mesh.data', 'mesh.fsdp', 'mesh.tensor', 'accumulate',
    'remat', 'attention')
CONSEQUENCES = {
    'accumulate': ': the batches stay, but what is drawn at random in a step is drawn for each slice'}
ARGUMENTS = ('model', 'sample', 'mesh', 'scale_weights')  # sections that are handed on whole: no setting too many


def fingerprint(params):
  """12 hexadecimal digits that name a set of parameters: a hash over paths, types, shapes and values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    array = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()[:12]


def read_config(workdir):
  """The locked config of a workdir; settings that it does not know yet are at their defaults. UserError without one."""
  path = pathlib.Path(workdir) / 'config.json'
  try:
    settings = json.loads(path.read_text())
    if settings['stage'] not in ('tokenizer', 'generator') or not isinstance(settings['model'], dict):
      raise ValueError('it is not the config of a tokenizer or generator')
    defaults = getattr(configs, settings['stage'])().to_dict()
    return ml_collections.ConfigDict(_merged(defaults, settings)).lock()
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f'{workdir} is no workdir, it has no config.json: give the --workdir of a training run') from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    why = f'it has no {error}' if isinstance(error, KeyError) else error
    raise UserError(f'{path} cannot be used ({why}): restore it from a copy') from None


def _merged(defaults, settings, section=''):
  """Defaults with the settings that are stored. ValueError for one of another kind, or where none can be added."""
  merged = dict(defaults)
  for name, value in settings.items():
    if name not in defaults and section.rstrip('.') in ARGUMENTS:
      raise ValueError(f'{section}{name} is no setting that this version knows')
    if name in defaults and isinstance(defaults[name], dict):
      if not isinstance(value, dict):
        raise ValueError(f'{section}{name} is no section of settings')
      value = _merged(defaults[name], value, f'{name}.')
    elif name in defaults:
      value = _alike(value, defaults[name], f'{section}{name}')
    merged[name] = value
  return merged


def _alike(value, default, name):
  """A stored value, of the kind of its default: a number, a text, a truth or a tuple of numbers, or of such."""
  kind, number = type(default), type(value) in (int, float)
  if kind is tuple and isinstance(value, list):
    return tuple(_alike(x, default if isinstance(x, list) else default[0], name) for x in value)
  if kind is float and number and abs(value) <= sys.float_info.max:
    return float(value)
  if type(value) is not kind or number and abs(value) >= 2**63:
    raise ValueError(f'{name} is {str(value)[:60]!r}, which is no {kind.__name__}')
  return value


def class_names(workdir):
  """Names of a workdir's classes in the order of their labels, a tuple of str; None where none are kept."""
  path = pathlib.Path(workdir) / 'classes.json'
  try:
    names = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} cannot be used ({error}): restore it from a copy, or remove it') from None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f'{path} is no list of names: restore it from a copy, or remove it')
  return tuple(names)


def write_class_names(workdir, names):
  """Writes classes.json, whole or not at all; of several processes the first does."""
  _write_json(workdir, 'classes.json', list(names))


def check_class_names(workdir, names):
  """UserError when a workdir's classes are others, or in another order: labels would change their meaning."""
  old = class_names(workdir)
  if old is None or old == tuple(names):
    return
  label = next((i for i, pair in enumerate(zip(old, names)) if pair[0] != pair[1]), min(len(old), len(names)))
  there, here = (repr(some[label]) if label < len(some) else 'none' for some in (old, names))
  raise UserError(
      f'{workdir} holds a run with {len(old)} classes, the data has {len(names)}, and label {label} is {there} there, '
      f'{here} here: give the same data, or use another --workdir (--config.start_from={workdir} begins with what this '
      'one has learned)')


def keep_class_names(workdir, place):
  """Writes the names that the workdir `place` keeps, if it does, into another one."""
  if (names := class_names(place)) is not None:
    write_class_names(workdir, names)


def check_config(workdir, config):
  """Notes on what changes when a run goes on. UserError when it has other settings of the kind that must not change."""
  if not (pathlib.Path(workdir) / 'config.json').exists():
    return []
  old, new = (flatten_dict(json.loads(c.to_json()), sep='.') for c in (read_config(workdir), config))
  differing = sorted(k for k in old.keys() & new.keys() if old[k] != new[k])
  changed = [k for k in differing if k not in RUN_ONLY]
  if old['stage'] != new['stage']:
    raise UserError(f'{workdir} holds a run with other settings (stage is {old["stage"]!r} there, {new["stage"]!r} '
                    'here): use another --workdir')
  if changed:
    name = changed[0]
    raise UserError(
        f'{workdir} holds a run with other settings ({", ".join(changed[:4])}; {name} is {old.get(name)!r} there, '
        f'{new.get(name)!r} here): use another --workdir, or the same settings; free to change are '
        f'{", ".join(k for k in RUN_ONLY if k in new)}')
  return [f'{k} is now {new[k]!r}, it was {old.get(k)!r}{CONSEQUENCES.get(k, "")}' for k in differing]


def write_config(workdir, config):
  """Writes config.json, whole or not at all; of several processes the first does."""
  _write_json(workdir, 'config.json', json.loads(config.to_json()))


def _write_json(workdir, name, content):
  if not processes.is_first():
    return
  path = pathlib.Path(workdir) / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.text(path, json.dumps(content, indent=2) + '\n')
  except OSError as error:
    raise cannot_write(workdir, error) from None


def activation_dtype(config):
  """The config's dtype of activations."""
  if config.dtype not in ('float32', 'bfloat16'):
    raise UserError(f'dtype {config.dtype!r} is not supported: use float32 or bfloat16')
  return jnp.dtype(config.dtype)


def _remat(config):
  if config.remat not in POLICIES:
    raise UserError(f'there is no remat {config.remat!r}: use one of {", ".join(POLICIES)}')
  return config.remat


def make_tokenizer(config):
  """The `Tokenizer` of a tokenizer's config. UserError when the scales do not end in the latent's size."""
  fields = dict(config.model)
  fields['ch_mult'] = tuple(fields['ch_mult'])
  tokenizer = Tokenizer(
      Pyramid.of(fields.pop('scales')), **fields, remat=_remat(config), dtype=activation_dtype(config))
  if len(config.image_size) != 2 or min(config.image_size) < 1:
    raise UserError(f'image_size is {tuple(config.image_size)}: give height and width, such as {tokenizer.image_size}')
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
  if config.attention not in IMPLEMENTATIONS:
    raise UserError(f'there is no attention {config.attention!r}: use one of {", ".join(IMPLEMENTATIONS)}')
  if config.attention == 'cudnn' and config.dtype != 'bfloat16':
    raise UserError("attention='cudnn' works in bfloat16 alone: add --config.dtype=bfloat16, or leave it at auto")
  fields.update(width=width, heads=heads, remat=_remat(config), attention=config.attention)
  pyramid = dataclasses.replace(tokenizer.pyramid, markov=fields.pop('markov'))
  return Generator(
      pyramid, tokenizer.codes, tokenizer.channels, **fields, dtype=activation_dtype(config))


def image_size(workdir):
  """(height, width) in pixels that a workdir's model takes and gives."""
  config = read_config(workdir)
  return tuple((config if config.stage == 'tokenizer' else read_config(pathlib.Path(workdir) / 'tokenizer')).image_size)


def tokenizer_shapes(tokenizer):
  """Shapes of a `Tokenizer`'s parameters."""
  return _shapes(tokenizer, jax.ShapeDtypeStruct((1, *tokenizer.image_size, 3), jnp.float32))


def generator_shapes(generator):
  """Shapes of a `Generator`'s parameters."""
  teacher = (1, generator.pyramid.length - generator.pyramid.sizes[0], generator.channels)
  return _shapes(generator, jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct(teacher, jnp.float32))


def _shapes(module, *inputs):
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']


def load_tokenizer(workdir, say=note, *, raw=False):
  """(Tokenizer, parameters) of a tokenizer's workdir, or of the copy in a generator's. raw: not their average."""
  config = read_config(workdir)
  if config.stage == 'generator':
    return load_tokenizer(pathlib.Path(workdir) / 'tokenizer', say)
  tokenizer = make_tokenizer(config)
  return tokenizer, _load_params(workdir, tokenizer_shapes(tokenizer), say, raw and config.ema)


def load_generator(workdir, say=note, *, raw=False):
  """(Generator, parameters, Tokenizer, its parameters). UserError when the tokenizer is not the one trained with.

  raw: the generator's parameters themselves where the run keeps an average of them.
  """
  config = read_config(workdir)
  if config.stage != 'generator':
    raise UserError(f'{workdir} holds a tokenizer: give the workdir of a generator')
  config.attention = 'auto'  # it may have been trained on other devices
  tokenizer, tokenizer_params = load_tokenizer(workdir, say)
  generator, found = make_generator(config, tokenizer), fingerprint(tokenizer_params)

  def check(metadata):
    if metadata and metadata.get('tokenizer') != found:
      raise UserError(
          f'the tokenizer in {workdir}/tokenizer is not the one that this generator was trained with (fingerprint '
          f'{found}, wanted {metadata.get("tokenizer")}): restore that folder from the workdir it was trained with')

  params = _load_params(workdir, generator_shapes(generator), say, raw and config.ema, check)
  return generator, params, tokenizer, tokenizer_params


def _load_params(workdir, shapes, say, raw, check=lambda metadata: None):
  """Parameters of the newest readable checkpoint. check: is called with what was stored beside them."""
  if not (pathlib.Path(workdir) / 'checkpoints').is_dir():
    raise UserError(f'{workdir} has no checkpoint yet: train it first, or wait for its first one')
  with Checkpoints(workdir, say=say) as checkpoints:
    check(checkpoints.newest_metadata())
    return checkpoints.restore_model(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), raw)[0]
