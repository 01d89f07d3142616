"""What a run takes from other workdirs at its start, and what it keeps for those that come after it."""

import pathlib
import shutil

import jax

from var_jax import workdir as workdir_lib
from var_jax.errors import UserError, note
from var_jax.generator import adapt
from var_jax.training import processes
from var_jax.training.checkpoint import Checkpoints, steps_on_disk


def _begins(workdir, config):
  """Whether a run takes its first parameters from `start_from`: later it goes on from its own checkpoints."""
  return config.start_from and not steps_on_disk(pathlib.Path(workdir) / 'checkpoints')


def initial_tokenizer(workdir, config, tokenizer):
  """The parameters that a tokenizer's run begins with, None for new ones. UserError when they do not fit."""
  if not _begins(workdir, config):
    return None
  old, params = workdir_lib.load_tokenizer(config.start_from)
  adapt.check_alike(old, tokenizer, adapt.TOKENIZER_FIELDS)
  adapt.check(params, workdir_lib.tokenizer_shapes(tokenizer), 'this tokenizer')
  return jax.device_get(params)  # the run places them itself


def initial_generator(workdir, config, generator):
  """The parameters that a generator's run begins with, see `generator.adapt`; None for new ones."""
  if not _begins(workdir, config):
    return None
  old, params, _, _ = workdir_lib.load_generator(config.start_from)
  adapt.check_alike(old, generator, adapt.GENERATOR_FIELDS)
  return jax.device_get(adapt.adapted(params, old, generator, workdir_lib.generator_shapes(generator)))


def find_guide(config, generator, tokenizer_params):
  """The parameters of the model in `start_from`. UserError unless it is of this generator's kind in every respect."""
  old, params, _, old_tokenizer = workdir_lib.load_generator(config.start_from)
  adapt.check_alike(old, generator, (*adapt.GENERATOR_FIELDS, 'classes', 'pyramid'))
  if workdir_lib.fingerprint(old_tokenizer) != workdir_lib.fingerprint(tokenizer_params):
    raise UserError(f'{config.start_from} has another tokenizer, whose tokens mean something else: to learn its '
                    f'guidance, add --config.tokenizer={config.start_from}')
  return jax.device_get(params)


def find_tokenizer(workdir, source, say=note):
  """(its workdir, Tokenizer, parameters): the copy in a generator's workdir, or that in `source` at the first start.

  UserError when there is none, or when `source` is another than the copy.
  """
  copy = pathlib.Path(workdir) / 'tokenizer'
  if not (copy / 'config.json').exists():
    if not source:
      raise UserError('a generator needs a tokenizer: add --config.tokenizer=DIR, the workdir of a trained one')
    place = pathlib.Path(source)
    place = place / 'tokenizer' if workdir_lib.read_config(place).stage == 'generator' else place
    return place, *workdir_lib.load_tokenizer(place, say)
  tokenizer, params = workdir_lib.load_tokenizer(copy, say)
  if source and pathlib.Path(source).exists():
    wanted, found = workdir_lib.fingerprint(params), workdir_lib.fingerprint(workdir_lib.load_tokenizer(source, say)[1])
    if found != wanted:
      raise UserError(
          f'the tokenizer in {source} has other parameters than this generator expects (fingerprint {found}, wanted '
          f'{wanted}): point --config.tokenizer at the workdir it was trained with, or use another --workdir')
  return copy, tokenizer, params


def keep_tokenizer(workdir, place, params):
  """Puts a copy of the tokenizer at `place` into a generator's workdir, unless it is there."""
  copy = pathlib.Path(workdir) / 'tokenizer'
  if copy == place:
    return
  with Checkpoints(copy) as checkpoints:
    checkpoints.save_model(0, jax.device_get(params), {})
  workdir_lib.write_config(copy, workdir_lib.read_config(place))
  workdir_lib.keep_class_names(copy, place)


def keep_best(workdir, config, metadata, params, step):
  """Keeps a model in `WORKDIR/best`, a workdir of its own without what only training needs."""
  best, tokenizer = pathlib.Path(workdir) / 'best', pathlib.Path(workdir) / 'tokenizer'
  with Checkpoints(best, keep=1) as checkpoints:
    checkpoints.save_model(step, params, metadata)
  if processes.is_first() and tokenizer.exists() and not (best / 'tokenizer').exists():
    shutil.copytree(tokenizer, best / 'tokenizer')
  workdir_lib.write_config(best, config)
  workdir_lib.keep_class_names(best, workdir)
