"""Experiments: files with a `get_config(argument)`, wherever they lie, and settings that replace theirs.

    config = read_config('experiments/digits.py:generator,depth=4', ['--config.optimizer.peak_lr=1e-3'])
"""

import ast
import contextlib
import math
import os
import pathlib
import sys
import types

import ml_collections

import var_jax
from var_jax import configs, paths
from var_jax.errors import UserError, did_you_mean, note

PATHS = ('data.path', 'tokenizer', 'start_from', 'measure.inception', 'measure.reference')  # settings that are a path
PATH_LISTS = ('loss.lpips_weights',)  # or several, FILE,FILE
PREFIX = '--config.'


def read_config(path, overrides):
  """The locked config of 'FILE.py:argument' with overrides ['--config.a.b=v', …]. UserError for anything unknown."""
  file, colon, argument = path.partition(':')
  module = load(file)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f'{file} has no get_config(argument): see experiments/digits.py for one')
  with running(module.__file__):
    config = module.get_config(*([argument] if colon else []))
  _check_whole(config, file)
  return with_overrides(config, overrides)


def with_overrides(config, overrides):
  """A config, locked, with settings ['--config.a.b=v', …] in place of its own. UserError for anything unknown."""
  config.lock()
  for text in overrides:
    _override(config, text)
  for names, read in ((PATHS, paths.local), (PATH_LISTS, paths.locals_of)):
    for name in names:
      section, key = _place(config, name)
      if section is not None and isinstance(section[key], str) and section[key]:
        try:
          section[key] = read(section[key])
        except UserError as error:
          raise UserError(f'{PREFIX}{name}: {error}') from None
  return config


def _check_whole(config, file):
  """Raises UserError unless a config has all settings of its stage."""
  start = 'start from configs.tokenizer() or configs.generator()'
  if not isinstance(config, ml_collections.ConfigDict) or config.get('stage') not in ('tokenizer', 'generator'):
    raise UserError(f'get_config in {file} gives no config of a tokenizer or generator: {start}')
  if missing := [name for name in _names(getattr(configs, config.stage)()) if _place(config, name)[0] is None]:
    raise UserError(f'get_config in {file} gives a config without {missing[0]}: {start}')


def find(file):
  """The path of an experiment's file; var_jax's own ones are found from any folder. UserError where there is none."""
  path = pathlib.Path(paths.local(file))
  if path.is_dir():
    raise UserError(f'{file} is a folder: name an experiment in it, such as {file}/digits.py:tokenizer')
  if path.is_file():
    return path
  ours = _home() / path
  if path.is_absolute() or path.parts[:1] != ('experiments',) or not ours.is_file():
    known = sorted(p.name for p in (_home() / 'experiments').glob('*.py'))
    near = did_you_mean(path.name, known)
    raise UserError(f'there is no experiment {file}{near or ":"} see the experiments/ folder ({_home()}/experiments), '
                    'or check the path')
  note(f'there is no {file} in this folder: taking {ours}')
  return ours


def load(file):
  """The module of an experiment. UserError for whatever its code raises."""
  path = find(file)
  module = types.ModuleType('var_jax_experiment')
  module.__file__ = str(path)
  sys.modules[module.__name__] = module  # where dataclasses and pickles look
  with running(module.__file__):
    exec(compile(path.read_bytes(), str(path), 'exec'), module.__dict__)
  return module


def _home():
  """The folder that holds experiments/: the checkout, or the installed package."""
  package = pathlib.Path(var_jax.__file__).parent
  return package if (package / 'experiments').is_dir() else package.parent


@contextlib.contextmanager
def running(file):
  """Within, an experiment's code runs: it imports from the current folder, its own, and `experiments`, however the
  command began. UserError for whatever it raises.
  """
  before = list(sys.path)
  sys.path.insert(0, os.getcwd())
  sys.path += [os.path.dirname(os.path.abspath(file)), str(_home())]
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # an experiment is code, and may fail in any way
    raise UserError(f'{file} fails with {type(error).__name__}: {" ".join(str(error).split())[:200]}') from error
  finally:
    sys.path[:] = before


def _place(config, name):
  """(section, key) of a dotted name; (None, key) where the config has no such setting."""
  *sections, key = name.split('.')
  for section in sections:
    config = config[section] if section and section in config else None
    if not isinstance(config, ml_collections.ConfigDict):
      return None, key
  return (config, key) if key and key in config else (None, key)


def _override(config, text):
  """Sets what '--config.a.b=v' says. UserError for a setting that does not exist, a section, or another type."""
  name, equals, value = text.removeprefix(PREFIX).partition('=')
  section, key = _place(config, name)
  if section is None:
    near = did_you_mean(name, _names(config))
    near = near or '; those of var_jax/configs.py can be set'
    raise UserError(f'no such setting: {name!r} of a {config.stage}{near}')
  old = section[key]
  if name == 'stage':
    raise UserError('the stage is said by --config=FILE.py:tokenizer or FILE.py:generator, not by --config.stage')
  if isinstance(old, ml_collections.ConfigDict):
    raise UserError(f'{name} is a section: set what is in it, such as {PREFIX}{name}.{next(iter(old), "NAME")}=VALUE')
  if not equals and not isinstance(old, bool):
    raise UserError(f'{PREFIX}{name} has no value: write {PREFIX}{name}={_example(old)}')
  try:
    section[key] = _parse(value if equals else 'true', old)
  except (ValueError, TypeError, OverflowError) as error:
    raise UserError(
        f'{PREFIX}{name}={value[:60]!r} is not {error}: write such as {PREFIX}{name}={_example(old)}') from None


def _names(config, prefix=''):
  """Dotted names of all settings."""
  return [name for key, value in config.items() for name in
          (_names(value, f'{prefix}{key}.') if isinstance(value, ml_collections.ConfigDict) else [f'{prefix}{key}'])]


def _example(old):
  return repr(old).replace(' ', '') if isinstance(old, tuple) else old if old not in ('', None) else 'VALUE'


def _parse(text, old):
  """A value of the kind of the one that it replaces. Raises ValueError whose message is what the text should be."""
  if isinstance(old, bool):
    if not text or text.lower() not in configs.WORDS:
      raise ValueError('true or false')
    return configs.WORDS[text.lower()]
  if isinstance(old, int):
    return _number(text, int, 'a whole number')
  if isinstance(old, float):
    return _number(text, float, 'a number')
  if isinstance(old, str):
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    if old is None:
      return text
    raise ValueError('a list') from None
  if old is None:
    return value
  value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
  whole = all(isinstance(x, int) for x in _leaves(old))
  if not all(isinstance(x, int if whole else (int, float)) and not isinstance(x, bool) for x in _leaves(value)):
    raise ValueError('a list of whole numbers' if whole else 'a list of numbers')
  return value


def _number(text, kind, what):
  try:
    value = kind(text)
  except ValueError:
    raise ValueError(what) from None
  if not abs(value) < 2**32 if kind is int else not math.isfinite(value):
    raise ValueError(f'{what} that a run can use')
  return value


def _leaves(value):
  return [leaf for part in value for leaf in (_leaves(part) if isinstance(part, (list, tuple)) else [part])]
