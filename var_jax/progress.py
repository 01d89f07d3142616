"""The one progress bar: on stderr, after two seconds, and in a log file only once in half a minute."""

import sys

import tqdm


def bar(things=None, *, title, unit, total=None, initial=0, delay=2, show=True):
  """A tqdm bar over `things`, or of `total` steps to `update`."""
  slow = 0.5 if sys.stderr.isatty() else 30
  return tqdm.tqdm(things, total=total, initial=initial, desc=title, unit=unit, mininterval=slow, delay=delay,
                   disable=not show, dynamic_ncols=True)
