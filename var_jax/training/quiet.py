"""Keeps orbax and its libraries quiet: what a person has to know of them, `checkpoint` says in a line."""

import contextlib
import logging
import warnings


def no_straggler(record):
  """A filter for asyncio's log: once one read of a checkpoint has failed, others do, at any time."""
  return 'never retrieved' not in record.getMessage()


@contextlib.contextmanager
def no_logs():
  """Silences orbax and absl, whose notes about asynchronous internals would drown our own."""
  loggers = [logging.getLogger(name) for name in ('absl', 'orbax', 'asyncio')]
  levels = [logger.level for logger in loggers]
  try:
    for logger in loggers:
      logger.setLevel(logging.CRITICAL)
    yield
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)


@contextlib.contextmanager
def quiet():
  """Silences their warnings as well."""
  with no_logs(), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    yield
