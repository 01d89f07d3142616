"""How every command ends: bad input as one line, Ctrl-C and other signals at any moment, and the exit status."""

import errno
import os
import sys

from var_jax import signals
from var_jax.errors import UserError


def status(main, arguments):
  """The exit status of main(arguments): 0 for None, 2 for bad input, 130 after Ctrl-C."""
  try:
    return main(arguments) or 0
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except MemoryError:
    print('error: that is more than fits into memory: ask for fewer or smaller images at a time', file=sys.stderr)
    return 2
  except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
    os._exit(0)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      print(f'error: {error}: free some space and run the same command again', file=sys.stderr)
    elif error.filename:
      print(f'error: cannot use {error.filename} ({error.strerror}): check what is there, or move it away',
            file=sys.stderr)
    else:
      raise
    return 2
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    return 130


def with_huge_pages():
  """Begins this process anew, with memory in huge pages where glibc can do that. Before anything is imported.

  XLA asks for its buffers anew at each call: in small pages that takes a sixth of a training step on a CPU.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'  # what one cannot set in a process that runs
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def stop_at_once():
  """Lets signals such as Ctrl-C end the process. Before anything is imported, which takes seconds."""
  signals.end_at_once()


def run(main):
  """Ends the process with `status` of main(the command line), or at once when a signal asks for it."""
  stop_at_once()
  code = status(main, sys.argv[1:])
  if code > 128:
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)
