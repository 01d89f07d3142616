"""Eight virtual CPU devices for every test, set before jax starts, and as little compiling as possible."""

import os
import pathlib

import jax
import pytest
import tiny_runs

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Most of a test's time is compiling: without costly optimizations, and each program once.
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
if not jax.config.jax_compilation_cache_dir:
  folder = str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax_tests')
  jax.config.update('jax_compilation_cache_dir', folder)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder  # for the processes that tests start


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  return tiny_runs.write_experiment(tmp_path_factory.mktemp('experiments'))


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Compiled programs take gigabytes by the end of the suite: each file leaves none behind."""
  yield
  jax.clear_caches()
