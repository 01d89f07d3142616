"""Where a run's numbers go: `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import math
import pathlib
import sys
import time

import numpy as np
from PIL import Image
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from var_jax import whole
from var_jax.training import processes


def set_aside(workdir):
  """Adds what a run wrote that now begins anew to `metrics_before.jsonl`. Whether there was anything."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not processes.is_first() or not any(row['step'] > 0 for row in _rows(path)):
    return False
  before, lines = path.with_name('metrics_before.jsonl'), _lines(path)
  earlier = _lines(before)
  if earlier[-len(lines):] != lines:  # else a kill came before the next line
    _replace(before, earlier + lines)
  path.unlink()
  return True


class Writer:
  """Appends to `WORKDIR/metrics.jsonl` and TensorBoard events. Lines after `step`, of a lost stretch, are dropped.

  Of several processes the first writes; all remember.
  """

  def __init__(self, workdir, step):
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._latest, self._events = {}, None  # name: (step, value)
    self._earlier = [row for row in _rows(self.path) if row['step'] <= step]
    for row in processes.from_first([row for row in self._earlier if row['step'] == step]):
      self._remember(step, row)
    if not processes.is_first():
      return
    lines = _lines(self.path)
    kept = [line for line in lines if (row := _row(line)) and row['step'] <= step]
    if kept != lines:
      _replace(self.path, kept)
    self._events = _Events(pathlib.Path(workdir) / 'tensorboard', step)

  def scalars(self, step, values):
    """One line of {name: number}; a value that is not finite becomes null, so that every line stays JSON."""
    numbers = {name: float(value) for name, value in values.items()}
    self._remember(step, numbers)
    if self._events is None:
      return
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with self.path.open('a') as file:
      file.write(json.dumps({'step': step} | finite) + '\n')
    self._events.write(step, [summary.scalar(name, value) for name, value in numbers.items()])

  def _remember(self, step, numbers):
    self._latest |= {name: (step, value) for name, value in numbers.items()}

  def at(self, name, step):
    """The value of a scalar at this very step, None when it has none."""
    last, value = self._latest.get(name, (None, None))
    return value if last == step else None

  def history(self, name):
    """[(step, value)] of a scalar, of what the first process found at the start."""
    return processes.from_first([(row['step'], row[name]) for row in self._earlier if row.get(name) is not None])

  def has_scalars(self, prefix, step):
    """Whether scalars whose names begin so were written at this very step."""
    return any(name.startswith(prefix) and last == step for name, (last, _) in self._latest.items())

  def has_pictures(self, step):
    """Whether pictures of this step are there, as the first process sees it."""
    return processes.from_first(any((self.path.parent / 'pictures').glob(f'[!.]*_{step:07d}.png')))

  def picture(self, step, name, image_HxWx3):
    """One uint8 picture, to `WORKDIR/pictures/NAME_STEP.png` as well, whole or not at all."""
    if self._events is None:
      return
    folder = self.path.parent / 'pictures'
    folder.mkdir(exist_ok=True)
    whole.file(folder / f'{name}_{step:07d}.png', Image.fromarray(image_HxWx3).save)
    self._events.write(step, [summary.image(name, image_HxWx3, dataformats='HWC')])

  def close(self):
    if self._events is not None:
      self._events.close()


class _Events:
  """TensorBoard's events, each on the disk when `write` returns: tensorboardX's own writer would lose those that wait
  when it is killed, and wait for ever for its thread when the disk is full.
  """

  def __init__(self, folder, step):
    """Events after `step`, of a lost stretch, are hidden."""
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')  # never an earlier one
    begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=step + 1, session_log=begins))

  def write(self, step, summaries):
    values = [value for each in summaries for value in each.value]
    self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

  def _write(self, event):
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()

  def close(self):
    self._writer.close()


def read(path):
  """{name: [(step, value), ...]} of a metrics.jsonl, without broken lines; empty when there is none."""
  series = {}
  for row in _rows(pathlib.Path(path)):
    for name, value in row.items():
      if name != 'step' and value is not None:
        series.setdefault(name, []).append((row['step'], value))
  return series


def _lines(path):
  return path.read_text(errors='replace').splitlines() if path.exists() else []


def _rows(path):
  return [row for line in _lines(path) if (row := _row(line))]


def _row(line):
  """{'step': int, name: finite number or None} of a line; None of one that is cut short, or says something else."""
  try:
    row = json.loads(line)
    if type(row['step']) is not int or not 0 <= row['step'] < 2**31:
      return None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return {name: value if _is_number(value) else None for name, value in row.items()}


def _is_number(value):
  return type(value) in (int, float) and abs(value) <= sys.float_info.max  # not NaN either


def _replace(path, lines):
  """Writes the lines of a file, whole or not at all."""
  whole.text(path, ''.join(line + '\n' for line in lines))


class Mean:
  """Means of metrics over those steps of a stretch that have them; counters (skipped…) keep their last value."""

  def __init__(self):
    self._sums, self._counts, self._count, self._last, self._since = {}, {}, 0, {}, time.monotonic()

  @contextlib.contextmanager
  def paused(self):
    """Within, time does not count."""
    begun = time.monotonic()
    yield
    self._since += time.monotonic() - begun

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
