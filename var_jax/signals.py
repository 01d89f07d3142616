"""What asks a process to end: Ctrl-C and SIGTERM, SIGHUP of a lost connection, SIGUSR1 and SIGUSR2 of schedulers."""

import contextlib
import functools
import os
import signal
import threading

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_last_words = 'stopped'  # what to say before ending at once; None where that would lose something


def heard():
  """Those that are not to be ignored. SIGHUP is, under nohup; Ctrl-C never, though shells ignore it for jobs with &."""
  return [n for n in NUMBERS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]


@functools.cache
def end_at_once():
  """Lets each end this process with one line and the status 128 + its number, but within `waiting`.

  By a thread, which Python wakes at once: handlers would wait while XLA compiles. Not by an exception: imports and
  compiling threads would swallow it, or crash.
  """
  pipe, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
  for number in heard():
    signal.signal(number, lambda *_: None)
  threading.Thread(target=_watch, args=(pipe,), daemon=True).start()


def _watch(pipe):
  while True:
    for number in os.read(pipe, 64):
      if number in NUMBERS and _last_words is not None:
        by = '' if number == signal.SIGINT else f' ({signal.Signals(number).name})'
        os.write(2, f'{_last_words}{by}\n'.encode())
        os._exit(128 + number)


@contextlib.contextmanager
def _saying(words):
  global _last_words
  before, _last_words = _last_words, words
  try:
    yield
  finally:
    _last_words = before


def waiting():
  """Within, no signal ends the process at once."""
  return _saying(None)


def at_once(words='stopped'):
  """Within, which may be in `waiting`, signals end the process at once again, with these words."""
  return _saying(words)
