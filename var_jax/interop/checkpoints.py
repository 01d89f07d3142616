"""Published checkpoints <-> workdirs."""

import contextlib
import importlib.util
import json
import pathlib
import shutil

from var_jax import workdir as workdir_lib
from var_jax.errors import UserError, note
from var_jax.interop import architecture, published
from var_jax.training.checkpoint import Checkpoints
from var_jax.weights import inside, read_tensors, write_tensors

TELLING = {'tokenizer': 'quantize.embedding.weight', 'generator': 'word_embed.weight'}


def read(path, kind):
  """({torch name: array} of one network, 'tokenizer' or 'generator'; what errors call it). UserError without one."""
  tensors = read_tensors(path)
  own, prefix = inside(tensors, (TELLING[kind],), path)
  if TELLING[kind] in own:
    return own, f'{path}, under {prefix!r}' if prefix else str(path)
  for other, name in TELLING.items():
    if name in inside(tensors, (name,), path)[0]:
      raise UserError(f'{path} is a {other}, not a {kind}: pass it as --{other}')
  raise UserError(f'{path} holds no {kind}: none of its {len(tensors)} names ends in {TELLING[kind]}, the first is '
                  f'{next(iter(tensors))}: it is another network, or another file of it is meant')


@contextlib.contextmanager
def _named(where):
  """Within, errors begin with the file that they are about."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def write_workdir(workdir, tokenizer_file, generator_file, patch_nums=None, heads=0):
  """Writes published checkpoints as a workdir; generator_file: None for a tokenizer's.

  The workdir appears whole or not at all, and only when every tensor has its place. The networks are read one after
  the other, each into as much memory as it takes.
  """
  workdir = pathlib.Path(workdir).absolute()
  part = workdir.with_name(f'.part_{workdir.name}')
  shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
  try:
    _write_both(part, tokenizer_file, generator_file, patch_nums, heads)
    part.replace(workdir)
  except OSError as error:
    raise UserError(f'could not write {workdir} ({error.strerror or error}): choose another --workdir') from error
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _write_both(workdir, tokenizer_file, generator_file, patch_nums, heads):
  (tokenizer, where), generator = read(tokenizer_file, 'tokenizer'), None
  scales = patch_nums or architecture.PUBLISHED_SCALES[0]
  if generator_file:
    generator, generator_where = read(generator_file, 'generator')
    with _named(generator_where):
      scales = architecture.scales_of(generator, patch_nums)
  with _named(where):
    tokenizer_config, phi_each = architecture.tokenizer_config(tokenizer, scales, _settings_beside(tokenizer_file))
    model = workdir_lib.make_tokenizer(tokenizer_config)
    shapes = workdir_lib.tokenizer_shapes(model)
    names = published.tokenizer_names(shapes, phi_each)
    published.check(tokenizer, names, shapes, 'a published tokenizer')
  if generator_file:
    with _named(generator_where):
      config = architecture.generator_config(generator, heads)
      generator_shapes = workdir_lib.generator_shapes(workdir_lib.make_generator(config, model))
      generator_names = published.generator_names(generator_shapes)
      published.check(generator, generator_names, generator_shapes, 'a published generator')
  with _named(where):
    params = published.from_published(tokenizer, names, shapes)
  if not generator_file:
    _write(workdir, tokenizer_config, params, {})
    return
  metadata = {'tokenizer': workdir_lib.fingerprint(params)}
  _write(workdir / 'tokenizer', tokenizer_config, params, {})
  del params, tokenizer
  with _named(generator_where):
    generator_params = published.from_published(generator, generator_names, generator_shapes)
  _write(workdir, config, generator_params, metadata)


def _write(workdir, config, params, metadata):
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save_model(0, params, metadata)
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
    if generator.pyramid.markov:
      raise UserError('the published code knows no Markov scales: a generator with model.markov has no such file')
    tensors = published.to_published(generator_params, published.generator_names(generator_params))
    width = generator_params['word_embed']['bias'].shape[0]
    tensors |= published.generator_buffers(generator.pyramid, width, generator.depth)
  each = tokenizer.phi_layers == len(tokenizer.pyramid) not in (1, 4)
  vae = published.to_published(params, published.tokenizer_names(params, each))
  vae |= published.tokenizer_buffers(tokenizer.pyramid, tokenizer.codes)
  files = {'vae': vae} if config.stage == 'tokenizer' else {'vae': vae, 'var': tensors}
  for name, content in files.items():
    write_tensors(folder / f'{name}{suffix}', content)
  return [folder / f'{name}{suffix}' for name in files] + _write_settings(folder / 'vae.json', tokenizer)


def _settings_beside(file):
  """What `_write_settings` left beside a tokenizer's file, {} where it left nothing."""
  path = pathlib.Path(file).with_suffix('.json')
  try:
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: type(like)(found[name]) for name, like in architecture.NOT_IN_FILES.items() if name in found}
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f'{path} cannot be read ({error}): it tells how the tokenizer beside it differs from the published '
                    'one; write both again by --to_torch') from error


def _write_settings(path, tokenizer):
  """Writes what a tokenizer's checkpoint cannot hold where that is not as published; returns what was written."""
  found = {name: getattr(tokenizer, name) for name in architecture.NOT_IN_FILES}
  if found == architecture.NOT_IN_FILES and not tokenizer.ch % found['groups']:
    return []
  path.write_text(json.dumps(found, indent=2) + '\n')
  note('this tokenizer is not built as the published one ('
       + ', '.join(f'{name} {found[name]}, there {value}' for name, value in architecture.NOT_IN_FILES.items())
       + f'): the published code gives other pictures unless it is changed; {path} tells `convert` on the way back')
  return [path]
