"""The one progress bar, on stderr and after two seconds: a bar in a terminal, whole lines in a log file."""

import contextlib
import sys
import threading
import time

import tqdm

from var_jax.errors import note

SLOW = 2  # seconds after which what is being done is said


def bar(things=None, *, title, unit, total=None, initial=0, delay=SLOW, show=True):
  """A bar over `things`, or of `total` steps to `update`."""
  kind = Bar if sys.stderr.isatty() else _Lines
  return kind(things, total=total, initial=initial, desc=title, unit=unit, delay=delay, disable=not show)


class Bar(tqdm.tqdm):
  """A tqdm bar that leaves pauses out of its rate and of the time left."""

  def __init__(self, things, mininterval=0.5, **options):
    super().__init__(things, mininterval=mininterval, dynamic_ncols=True, leave=None, **options)

  @contextlib.contextmanager
  def doing(self, what, after=SLOW):
    """Within, the bar says what is being done in place of its own work; a log file does after so many seconds."""
    if self.disable:
      yield
      return
    begun = time.time()
    with self._saying(what, after):
      yield
    pause = time.time() - begun
    self.start_t, self.last_print_t = self.start_t + pause, self.last_print_t + pause

  @contextlib.contextmanager
  def _saying(self, what, after):
    self.set_postfix_str(what)
    yield
    self.set_postfix_str('', refresh=False)


class _Lines(Bar):
  """The same as lines without control characters, one in half a minute."""

  FORMAT = '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'

  def __init__(self, things, **options):
    self.shown = False
    super().__init__(things, mininterval=30, bar_format=self.FORMAT, **options)

  @staticmethod
  def status_printer(file):
    return lambda line: line and print(line, file=file, flush=True)

  def display(self, *arguments, **options):
    self.shown = True
    return super().display(*arguments, **options)

  def moveto(self, n):
    pass  # a line stays where it is

  def close(self):
    if not self.disable and self.shown:
      self.display()
    self.leave, self.delay = False, float('inf')  # nothing is left to be cleared
    super().close()

  @contextlib.contextmanager
  def _saying(self, what, after):
    timer = threading.Timer(after, note, [f'{self.desc}: {what}'])
    timer.daemon = True
    timer.start()
    try:
      yield
    finally:
      timer.cancel()
