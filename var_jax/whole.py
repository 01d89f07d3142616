"""Files that appear whole or not at all: what was there before stays when the disk is full, or a kill comes."""

import os
import pathlib

import numpy as np


def file(path, write):
  """Writes a file by write(another path with the same suffix), which then takes its name."""
  path = pathlib.Path(path)
  part = path.with_name(f'.part_{path.name}')
  try:
    write(part)
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def text(path, content):
  """Writes a text, through to the disk: a machine that fails would leave an empty file under the name."""

  def write(part):
    with part.open('w') as opened:
      opened.write(content)
      opened.flush()
      os.fsync(opened.fileno())

  file(path, write)


def arrays(path, **named):
  """Writes an .npz under this very name: given a path, numpy adds .npz where it ends in .NPZ."""

  def write(part):
    with part.open('wb') as opened:
      np.savez(opened, **named)

  file(path, write)
