"""Flags shared by the commands: argparse with one-line errors, and paths that are read as a person means them."""

import argparse
import collections
import contextlib
import re

from var_jax import paths
from var_jax.commands.experiment import read_config  # noqa: F401, commands call it by this module's name
from var_jax.errors import UserError, did_you_mean, note
from var_jax.training import processes

# A metavar that begins like this says that the flag is a path: DIR, FILE.py[:ARG], [KIND:]PATH, X.png|X.npz|DIR; or
# several, with dots: FILE,...
PATH = re.compile(r'(?P<kind>\[KIND:\])?(DIR|FILE|PATH|[A-Z]\.)[a-z.]*(?P<argument>\[:ARG\])?')


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
    for word in rest:
      if not (self._takes_settings() and word.startswith('--config.')):
        self._refuse(word)
    self._note_repeated(given(arguments or []))
    for action in self._actions:
      if isinstance(action.metavar, str) and PATH.match(action.metavar) and action.dest in options:
        setattr(options, action.dest, _as_meant(action, getattr(options, action.dest)))
    return options, rest

  def _takes_settings(self):
    return '--config.NAME' in self._option_string_actions

  def _refuse(self, word):
    """Of a word that no flag takes: what was meant by it."""
    name = word.partition('=')[0]
    known = [option[2:] for option in self._option_string_actions if option.startswith('--')]
    near = did_you_mean(name.lstrip('-'), known, '--') if name.startswith('-') else ''
    settings = '; settings are given as --config.NAME=VALUE' if self._takes_settings() and not near else ''
    self.error(f'unrecognized arguments: {word}{near}{settings}')

  def _note_repeated(self, names):
    """Says which of a flag's values counts when it is given more than once and takes one."""
    for name, times in collections.Counter(names).items():
      action = self._option_string_actions.get(f'--{name}')
      if times > 1 and (action is None or type(action).__name__ == '_StoreAction'):
        note(f'--{name} is given {times} times: the last one counts')

  def error(self, message):
    raise UserError(f'{message}; see `{self.prog} --help`')


def _as_meant(action, value):
  """A flag's path or paths as `paths.local` reads them; what else the flag takes stays."""
  if isinstance(value, list):
    return [_as_meant(action, one) for one in value]
  if not isinstance(value, str):
    return value
  shape = PATH.match(action.metavar)
  kind, argument = '', ''
  if shape['kind'] and not paths.URL.match(value):
    kind, colon, value = value.rpartition(':')
    kind += colon
  if shape['argument'] and not paths.URL.match(value):
    value, colon, argument = value.partition(':')
    argument = colon + argument
  try:
    return kind + (paths.locals_of if '...' in action.metavar else paths.local)(value) + argument
  except UserError as error:
    raise UserError(f'{action.option_strings[0]}: {error}') from None


def numbers(text):
  """'0,3,7' -> [0, 3, 7]."""
  try:
    return [int(part) for part in text.split(',')]
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is not a list of whole numbers such as 0,3,7') from None


def given(arguments):
  """Names of the flags on a command line."""
  return [argument[2:].partition('=')[0] for argument in arguments if argument.startswith('--')]


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
