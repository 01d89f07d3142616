"""Published checkpoints <-> workdirs."""

import importlib.util
import pathlib

from var_jax import workdir as workdir_lib
from var_jax.errors import UserError
from var_jax.interop import architecture, published
from var_jax.training.checkpoint import Checkpoints
from var_jax.weights import read_tensors, write_tensors

# A training checkpoint of the published code holds both networks, and the optimizer.
IN_TRAINER = {'tokenizer': 'trainer.vae_local.', 'generator': 'trainer.var_wo_ddp.'}
TELLING = {'tokenizer': 'quantize.embedding.weight', 'generator': 'word_embed.weight'}


def read(path, kind):
  """{torch name: array} of one network, 'tokenizer' or 'generator'; UserError when the file holds another."""
  tensors = read_tensors(path)
  prefix = IN_TRAINER[kind]
  inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
  tensors = inside or tensors
  for other, name in TELLING.items():
    if name in tensors and TELLING[kind] not in tensors:
      raise UserError(f'{path} is a {other}, not a {kind}: pass it as --{other}')
  return tensors


def write_workdir(workdir, tokenizer, generator, scales, heads=0):
  """Writes tensors {torch name: array} as a workdir; generator: None for a tokenizer's.

  Nothing is written unless every tensor has its place; config.json comes last, so that a half-written workdir is none.
  """
  tokenizer_config, phi_each = architecture.tokenizer_config(tokenizer, scales)
  model = workdir_lib.make_tokenizer(tokenizer_config)
  shapes = workdir_lib.tokenizer_shapes(model)
  names = published.tokenizer_names(shapes, phi_each)
  params = published.from_published(tokenizer, names, shapes, 'a published tokenizer')
  if generator is None:
    _write(workdir, tokenizer_config, params, {})
    return
  config = architecture.generator_config(generator, heads)
  shapes = workdir_lib.generator_shapes(workdir_lib.make_generator(config, model))
  names = published.generator_names(shapes)
  generator_params = published.from_published(generator, names, shapes, 'a published generator')
  metadata = {'tokenizer': workdir_lib.fingerprint(params)}
  _write(pathlib.Path(workdir) / 'tokenizer', tokenizer_config, params, {})
  _write(workdir, config, generator_params, metadata)


def _write(workdir, config, params, metadata):
  checkpoints = Checkpoints(workdir)
  try:
    checkpoints.save_model(0, params, metadata)
  finally:
    checkpoints.close()
  workdir_lib.write_config(workdir, config)


def describe(workdir):
  """A workdir's networks in a few words."""
  config = workdir_lib.read_config(workdir)
  folder = pathlib.Path(workdir) / 'tokenizer' if config.stage == 'generator' else workdir
  tokenizer = workdir_lib.make_tokenizer(workdir_lib.read_config(folder))
  height, width = tokenizer.image_size
  words = f'a tokenizer of {height}x{width} px, {tokenizer.codes} codes, {len(tokenizer.pyramid)} scales'
  if config.stage == 'tokenizer':
    return words
  return f'a generator of depth {config.model.depth}, {config.model.classes} classes, and {words}'


def write_published(workdir, folder):
  """Writes a workdir's networks as vae.* and, of a generator's, var.*; returns the paths.

  .pth where PyTorch is installed, else .safetensors. Names, layouts and buffers are those of the published code.
  """
  suffix = '.pth' if importlib.util.find_spec('torch') else '.safetensors'
  config = workdir_lib.read_config(workdir)
  if config.stage == 'tokenizer':
    tokenizer, params = workdir_lib.load_tokenizer(workdir)
  else:
    generator, generator_params, tokenizer, params = workdir_lib.load_generator(workdir)
    tensors = published.to_published(generator_params, published.generator_names(generator_params))
    width = generator_params['word_embed']['bias'].shape[0]
    tensors |= published.generator_buffers(generator.pyramid, width, generator.depth)
  each = tokenizer.phi_layers == len(tokenizer.pyramid) not in (1, 4)
  vae = published.to_published(params, published.tokenizer_names(params, each))
  vae |= published.tokenizer_buffers(tokenizer.pyramid, tokenizer.codes)
  files = {'vae': vae} if config.stage == 'tokenizer' else {'vae': vae, 'var': tensors}
  for name, content in files.items():
    write_tensors(folder / f'{name}{suffix}', content)
  return [folder / f'{name}{suffix}' for name in files]
