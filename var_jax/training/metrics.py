"""Where a run's numbers go: `metrics.jsonl` and TensorBoard."""

import json
import math
import pathlib
import time

import numpy as np
import tensorboardX
from PIL import Image

from var_jax.training import processes


def set_aside(workdir):
  """Adds what a run wrote that now begins anew to `metrics_before.jsonl`. Whether there was anything."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not processes.is_first() or not any(_step_of(line) > 0 for line in _lines(path)):
    return False
  with path.with_name('metrics_before.jsonl').open('a') as before:
    before.writelines(line + '\n' for line in _lines(path))
  path.unlink()
  return True


class Writer:
  """Appends to `WORKDIR/metrics.jsonl` and TensorBoard events. Lines after `step`, of a lost stretch, are dropped.

  Of several processes the first writes; all remember.
  """

  def __init__(self, workdir, step):
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._latest, self._events = {}, None  # name: (step, value)
    if not processes.is_first():
      return
    if self.path.exists():
      lines = [line for line in _lines(self.path) if _step_of(line) <= step]
      self.path.write_text(''.join(line + '\n' for line in lines))
    self._events = tensorboardX.SummaryWriter(str(pathlib.Path(workdir) / 'tensorboard'), purge_step=step + 1)

  def scalars(self, step, values):
    """One line of {name: number}; a value that is not finite becomes null, so that every line stays JSON."""
    numbers = {name: float(value) for name, value in values.items()}
    self._latest |= {name: (step, value) for name, value in numbers.items()}
    if self._events is None:
      return
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with self.path.open('a') as file:
      file.write(json.dumps({'step': step} | finite) + '\n')
    for name, value in numbers.items():
      self._events.add_scalar(name, value, step)

  def at(self, name, step):
    """The value of a scalar at this very step, None when it has none."""
    last, value = self._latest.get(name, (None, None))
    return value if last == step else None

  def history(self, name):
    """All values of a scalar so far."""
    return [value for _, value in read(self.path).get(name, [])]

  def picture(self, step, name, image_HxWx3):
    """One uint8 picture, to `WORKDIR/pictures/NAME_STEP.png` as well."""
    if self._events is None:
      return
    folder = self.path.parent / 'pictures'
    folder.mkdir(exist_ok=True)
    Image.fromarray(image_HxWx3).save(folder / f'{name}_{step:07d}.png')
    self._events.add_image(name, image_HxWx3, step, dataformats='HWC')

  def close(self):
    if self._events is not None:
      self._events.close()


def read(path):
  """{name: [(step, value), ...]} of a metrics.jsonl, without broken lines; empty when there is none."""
  series = {}
  for line in _lines(path):
    if _step_of(line) == math.inf:
      continue
    row = json.loads(line)
    for name, value in row.items():
      if name != 'step' and value is not None:
        series.setdefault(name, []).append((row['step'], value))
  return series


def _lines(path):
  return path.read_text(errors='replace').splitlines() if path.exists() else []


def _step_of(line):
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):  # a line cut short by a kill
    return math.inf


class Mean:
  """Means of metrics over those steps of a stretch that have them; counters (skipped…) keep their last value."""

  def __init__(self):
    self._sums, self._counts, self._count, self._last, self._since = {}, {}, 0, {}, time.monotonic()

  def add(self, metrics):
    metrics = {name: np.asarray(value) for name, value in metrics.items()}
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + value
      self._counts[name] = self._counts.get(name, 0) + 1
    self._last, self._count = metrics, self._count + 1

  def take(self):
    """The means since the last call, with `steps_per_second`."""
    values = {name: total / self._counts[name] for name, total in self._sums.items()}
    values |= {name: value for name, value in self._last.items() if name.startswith('skipped')}
    values['steps_per_second'] = self._count / max(time.monotonic() - self._since, 1e-9)
    self.__init__()
    return values
