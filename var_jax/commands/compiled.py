"""Where compiled programs are kept between commands: the second run of a command does not compile again."""

import hashlib
import os
import pathlib
import time

MOST_BYTES = 2 * 2**30  # then jax removes those that were not used for longest
LEAST_SECONDS = 0.1     # of compiling, for a program to be kept
HALF_WRITTEN = 60       # seconds after which an entry without its time of use is one that a kill cut short


def keep(environ=os.environ):
  """Turns jax's compile cache on, in the user's cache folder. Before jax is imported, which reads the environment.

  JAX_COMPILATION_CACHE_DIR, where it is set, stays; without a folder to write to, programs are compiled each time.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in environ:
    return
  home = environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = pathlib.Path(home, 'var_jax', 'compiled', _processor())
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(folder, os.W_OK):
      return
    _remove_half_written(folder)
  except OSError:
    return
  environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(MOST_BYTES))
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', str(LEAST_SECONDS))


def _processor():
  """A name for this kind of processor: a home may be shared by machines that cannot run each other's programs."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    features = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
  except OSError:
    features = ''
  return f'{os.uname().machine}-{hashlib.sha256(features.encode()).hexdigest()[:8]}'


def _remove_half_written(folder):
  """jax writes an entry, then its time of use. It would read an entry that a kill cut short again and again."""
  for entry in folder.glob('*-cache'):
    used = entry.with_name(entry.name.removesuffix('-cache') + '-atime')
    if not used.exists() and entry.stat().st_mtime < time.time() - HALF_WRITTEN:
      entry.unlink(missing_ok=True)
