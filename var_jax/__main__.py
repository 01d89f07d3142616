"""`python -m var_jax VERB`, the same as `var-jax VERB`: one file in `commands/` for each verb."""

import errno
import importlib
import os
import signal
import sys

from var_jax.errors import UserError

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
  """Runs one command. Exit status 0, 2 for bad input, 130 and 143 after Ctrl-C and SIGTERM."""
  arguments = sys.argv[1:] if arguments is None else arguments
  verb = arguments[0] if arguments else None
  if verb in ('--help', '-h', 'help'):
    print(USAGE % '\n'.join(f'  {name:12} {text}' for name, text in VERBS.items()))
    return 0
  try:
    if verb not in VERBS:
      raise UserError(f'{f"there is no verb {verb!r}" if verb else "a verb is missing"}: use one of {", ".join(VERBS)}')
    return importlib.import_module(f'var_jax.commands.{verb}').main(arguments[1:]) or 0
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except MemoryError:
    print('error: that is more than fits into memory: ask for fewer or smaller images at a time', file=sys.stderr)
    return 2
  except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
    os._exit(0)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    print(f'error: {error}: free some space and run the same command again', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    return 130


def entry():
  """The console script: `main`, and an exit that Ctrl-C can ask for at any moment."""

  def stop(number, frame):
    # Not by an exception: imports and compiling threads would swallow it, or crash while Python shuts down.
    os.write(2, b'stopped\n')
    os._exit(130)

  signal.signal(signal.SIGINT, stop)
  status = main()
  if status == 130:
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == '__main__':
  entry()
