"""Imported first by the Python scripts of this folder: begins them anew with the .venv that has var_jax."""

import importlib.util
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).absolute().parents[1] / '.venv'

if importlib.util.find_spec('var_jax') is None:
  if (HERE / 'bin/python').exists() and pathlib.Path(sys.prefix).absolute() != HERE:
    os.execv(HERE / 'bin/python', [str(HERE / 'bin/python'), *sys.argv])
  print('error: var_jax is not installed for this Python: run `bash launch/quickstart.sh`, which makes .venv, or '
        '`pip install -e .`', file=sys.stderr)
  sys.exit(2)
