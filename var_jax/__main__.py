"""`python -m var_jax VERB`, the same as `var-jax VERB`: one file in `commands/` for each verb."""

import importlib
import sys

from var_jax.commands import compiled, script
from var_jax.errors import UserError, did_you_mean

VERBS = {
    'train': 'train a tokenizer or a generator; resumes by itself',
    'sample': 'draw images of the classes asked for',
    'reconstruct': 'encode images and show them after every scale',
    'edit': 'draw a part of an image anew, of the class asked for or of none',
    'tokenize': 'the token pyramids of a data set, for faster training of generators',
    'convert': 'published PyTorch checkpoints to a workdir, and back',
    'export': 'artifacts that run without var_jax, and parameters alone',
    'evaluate': 'a model against held-out images: codebook usage, samples judged by class',
}

USAGE = """usage: var-jax VERB [flags]      (python -m var_jax VERB is the same)

%s

example: var-jax train --config=experiments/digits.py:tokenizer --workdir=runs/digits/tokenizer
`var-jax VERB --help` shows a verb's flags."""


def main(arguments=None):
  """Runs one command. Exit status 0, 2 for bad input, 128 + its number after a signal."""
  return script.status(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments):
  verb = arguments[0] if arguments else None
  if verb in ('--help', '-h', 'help'):
    print(USAGE % '\n'.join(f'  {name:12} {text}' for name, text in VERBS.items()))
    return 0
  if verb not in VERBS:
    missing = f'there is no verb {verb!r}{did_you_mean(verb, list(VERBS)) or ":"}' if verb else 'a verb is missing:'
    raise UserError(f'{missing} use one of {", ".join(VERBS)}')
  return importlib.import_module(f'var_jax.commands.{verb}').main(arguments[1:])


def entry():
  """The console script."""
  script.with_huge_pages()
  compiled.keep()
  script.run(_run)


if __name__ == '__main__':
  entry()
