"""Flags shared by the commands: argparse with one-line errors, and ml_collections' typed config overrides."""

import argparse
import contextlib
import pathlib

import absl.flags
import ml_collections
from ml_collections import config_flags

from var_jax.errors import UserError
from var_jax.training import processes


class Parser(argparse.ArgumentParser):
  """argparse whose errors are UserErrors and whose help ends in an example."""

  def __init__(self, verb, description, example):
    super().__init__(
        prog=f'python {verb}' if verb.endswith('.py') else f'var-jax {verb}', description=description,
        epilog=f'example:\n  {example}', allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

  def parse_known_args(self, arguments=None, namespace=None):
    options, rest = super().parse_known_args(arguments, namespace)
    empty = [name for name, value in vars(options).items() if value == '']
    if empty:
      self.error(f'--{empty[0]} is empty: give a value, or leave it out')
    return options, rest

  def error(self, message):
    raise UserError(f'{message}; see `{self.prog} --help`')


def numbers(text):
  """'0,3,7' -> [0, 3, 7]."""
  try:
    return [int(part) for part in text.split(',')]
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is not a list of whole numbers such as 0,3,7') from None


def given(arguments):
  """Names of the flags on a command line."""
  return [argument[2:].partition('=')[0] for argument in arguments if argument.startswith('--')]


def read_config(path, overrides):
  """The locked config of 'FILE.py:argument' with overrides ['--config.a.b=v', …]. UserError for anything unknown."""
  file = path.partition(':')[0]
  if not pathlib.Path(file).is_file():
    raise UserError(f'there is no experiment {file}: see the experiments/ folder, or check the path')
  strange = [o for o in overrides if not o.startswith('--config.')]
  if strange:
    raise UserError(f'unknown flag {strange[0]}; settings are given as --config.NAME=VALUE, see --help')
  values = absl.flags.FlagValues()
  arguments = ['var_jax', f'--config={path}', *overrides]
  try:
    config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True, sys_argv=arguments)
    values(arguments)
    config = values.config
  except UserError:
    raise
  except Exception as error:  # an experiment is code, and may fail in any way
    raise UserError(_explain(error, file)) from error
  if not isinstance(config, ml_collections.ConfigDict) or 'stage' not in config:
    raise UserError(f'get_config in {file} gives no config: start from configs.tokenizer() or configs.generator()')
  return config


def _explain(error, file):
  """One line from the errors of absl and ml_collections, which speak in paragraphs and hide the cause."""
  cause = error
  while (cause.__cause__ or cause.__context__) is not None and not isinstance(cause, UserError):
    cause = cause.__cause__ or cause.__context__
  if isinstance(cause, UserError):
    return str(cause)
  if isinstance(error, (absl.flags.Error, AttributeError, KeyError, TypeError)) and 'Traceback' not in str(error):
    text = ' '.join(str(error).replace('\\n', ' ').replace('\\', '').split())
    if isinstance(error, (AttributeError, KeyError)):  # ml_collections quotes these twice
      text = 'no such setting: ' + text.replace("'", '').strip('"')
    return text[:300]
  return f'{file} fails with {type(cause).__name__}: {" ".join(str(cause).split())[:200]}'


def add_distributed(parser):
  """The flags by which several processes do one thing together."""
  parser.add_argument('--distributed', metavar='auto|HOST:PORT,COUNT,INDEX', help='join the other processes of the '
                      'run; auto: a TPU pod, Slurm or Open MPI tells; else the first one\'s address, how many, which')
  parser.add_argument('--join_timeout', type=int, default=300, metavar='SECONDS', help='to wait for them (default 300)')


@contextlib.contextmanager
def together(options):
  """Within, this process is one of those that `add_distributed` asked for, if it did."""
  if options.distributed:
    in_range('--join_timeout', options.join_timeout, 1)
    processes.join(options.distributed, options.join_timeout)
  with processes.together():
    yield


def in_range(flag, value, least, most=None):
  """Raises UserError when a number that was given is out of range."""
  if value is not None and (value < least or most is not None and value > most):
    raise UserError(f'{flag}={value} is out of range: use {least} or more' + (f', and at most {most}' if most else ''))


def add_choices(parser, cfg=True):
  """The flags that say how tokens are drawn, with the published defaults; cfg: whether that is one of them."""
  if cfg:
    parser.add_argument('--cfg', type=float, default=1.5, help='guidance at the last scale, 0 for none (default 1.5)')
  parser.add_argument('--top_k', type=int, default=900, help='likeliest codes to draw from, 0 for all (default 900)')
  parser.add_argument('--top_p', type=float, default=0.96, help='their probability in all, 0 for all (default 0.96)')
  parser.add_argument('--temperature', type=float, default=1.0, help='of the logits (default 1)')
  parser.add_argument('--smooth', action='store_true', help='mix codes by Gumbel softmax: smoother, worse FID')


def choices(options):
  """The keyword arguments of `Model.sample` that `add_choices` gathered."""
  names = ('cfg', 'top_k', 'top_p', 'temperature', 'smooth')
  return {name: getattr(options, name) for name in names if name in options}
