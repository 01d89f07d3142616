"""How every command ends: bad input as one line, Ctrl-C and other signals at any moment, and the exit status."""

import errno
import io
import os
import select
import sys
import traceback

from var_jax import errors, signals
from var_jax.errors import UserError, first_line


def status(main, arguments):
  """The exit status of main(arguments): 0 for None, 2 for bad input, 130 after Ctrl-C."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')  # a terminal that lacks a character is no reason to fail
  try:
    return _whole(main, arguments)
  except UserError as error:
    return _refused(error)
  except MemoryError:
    return _refused('that is more than fits into memory: ask for fewer or smaller images at a time')
  except OSError as error:
    if isinstance(error, BrokenPipeError) and _is_unread():
      os._exit(0)  # whoever read the output, such as `head`, has seen enough
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      return _refused(f'{error}: free some space and run the same command again')
    if not error.filename:
      raise
    name = os.fsdecode(error.filename)
    return _refused(f'cannot use {name} ({error.strerror}): check what is there, or move it away')
  except (RuntimeError, AssertionError):  # jax starts its devices with the first computation, and has both for failure
    if not (why := _no_device()):
      raise
    return _refused(why)
  except FloatingPointError as error:  # what JAX_DEBUG_NANS and JAX_DEBUG_INFS are for
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if '/jax/' not in frame.filename]
    return _refused(f'{first_line(error)} at {frames[-1].filename}:{frames[-1].lineno}; without JAX_DEBUG_NANS and '
                    'JAX_DEBUG_INFS a run skips such steps')
  except KeyboardInterrupt:
    errors.note('stopped')
    return 130


def _whole(main, arguments):
  """What main(arguments) returns, once its output has left us."""
  try:
    code = main(arguments) or 0
  except SystemExit:  # argparse's --help
    _flush()
    raise
  _flush()
  return code


def _refused(why):
  """Says in one line what was wrong; returns the exit status."""
  errors.note(' '.join(f'error: {why}'.splitlines()))
  return 2


def _flush():
  if sys.stdout is not None:  # closed by the shell's >&-
    sys.stdout.flush()


def _is_unread():
  """Whether it is our own output that nobody reads any more, and not some other pipe that broke."""
  poll = select.poll()
  for descriptor in (1, 2):
    poll.register(descriptor, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _no_device():
  """Why jax cannot start its devices, '' where it can or was not asked to."""
  jax = sys.modules.get('jax')
  try:
    if jax:
      jax.devices()
    return ''
  except (RuntimeError, AssertionError) as error:
    asked = os.environ.get('JAX_PLATFORMS')
    asked, reason = f' for JAX_PLATFORMS={asked}' if asked else '', f' ({first_line(error)})' if str(error) else ''
    return (f'jax finds no device{asked}{reason}: unset JAX_PLATFORMS or set it to cpu, or install what the device '
            "needs, such as 'var_jax[cuda]'")


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
    _flush()
    os._exit(code)
  sys.exit(code)
