#!/usr/bin/env bash
# The test suite on a clean checkout: installs into .venv what it needs and runs all but the slow tests.
# Arguments go to pytest: `bash tests/run.sh -m slow` runs the slow ones, `bash tests/run.sh tests/test_data.py` a file.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

install_var_jax '.[test]'
export JAX_PLATFORMS=cpu
[ $# -gt 0 ] || set -- -m 'not slow'
# In the files' order, which ends in short ones: by the number of tests, one process would be left alone with the longest.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
