"""One run at a time in a workdir: by the file system's lock, and where it has none, by who came last."""

import contextlib
import fcntl
import functools
import os
import pathlib
import socket
import time

from var_jax.errors import UserError
from var_jax.training import processes


@contextlib.contextmanager
def alone(workdir):
  """Holds a folder's lock. UserError when another run works in it, as far as its file system has locks.

  Gives a function that raises UserError once another run has begun there: of two machines, the later one goes on.
  """
  if not processes.is_first():
    yield lambda: None
    return
  path, running = (pathlib.Path(workdir) / name for name in ('.lock', '.running'))
  ours = f'{socket.gethostname()}, process {os.getpid()}, {time.time_ns()}'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('a')
  except OSError as error:
    raise cannot_write(workdir, error) from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'another process is at work in {workdir}: wait for it, stop it, or use another one') from None
    except OSError:
      pass  # a file system without locks
    try:
      running.write_text(ours)
    except OSError as error:
      raise cannot_write(workdir, error) from None
    try:
      yield functools.partial(_check_alone, running, ours)
    finally:
      with contextlib.suppress(OSError, UserError):
        _check_alone(running, ours)
        running.unlink()


def _check_alone(running, ours):
  try:
    found = running.read_text()
  except OSError as error:
    raise UserError(f'{running.parent} is gone, or another run has been in it ({error.strerror}): this one stops; the '
                    'same command goes on from what is saved') from None
  if found != ours:
    raise UserError(f'another run has begun in {running.parent} (on {found.rpartition(", ")[0]}): this one stops, so '
                    'that they do not mix')


def cannot_write(workdir, error):
  return UserError(f'cannot write to {workdir} ({error.strerror}): choose another --workdir, or free some space')
