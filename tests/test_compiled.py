"""The compile cache of the commands."""

import os
import subprocess
import sys

from var_jax.commands import compiled


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
  """A second process finds what the first one compiled; an entry that a kill cut short does not stay."""
  program = 'from var_jax.commands import compiled; compiled.keep(); import jax; jax.jit(lambda x: x + 1)(1)'
  environ = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'} | {
      'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PLATFORMS': 'cpu'}
  entries = lambda: {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*-cache')}
  subprocess.run([sys.executable, '-c', program], env=environ, check=True)
  first = entries()
  assert first
  torn = next(iter(first)).with_name('jit_torn-1234-cache')
  torn.write_bytes(b'half')
  os.utime(torn, (0, 0))
  subprocess.run([sys.executable, '-c', program], env=environ, check=True)
  assert entries() == first


def test_compile_cache_of_ones_own_is_left_alone(tmp_path):
  environ = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path)}
  compiled.keep(environ)
  assert environ == {'JAX_COMPILATION_CACHE_DIR': str(tmp_path)}
