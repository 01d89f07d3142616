# Sourced by the scripts that start from a fresh clone, from the repository's top folder.

# install_var_jax WHAT: makes .venv when missing and installs WHAT ('.' or '.[extra]') into it, unless that was done.
install_var_jax() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is missing or older than 3.11: install Python 3.11 or newer, or set PYTHON=/path/to/it" >&2
    exit 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [ "$(cat ".venv/installed $1" 2>/dev/null)" != "$(cksum setup.py)" ]; then
    echo "installing $1 into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1"
    cksum setup.py > ".venv/installed $1"
  fi
}

# Compiled programs are kept, so that a second run starts faster.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
