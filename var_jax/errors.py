"""What a person is meant to read: the one exception, what others said in a line, and notes."""

import sys


class UserError(Exception):
  """Bad input: one line that says what is wrong and what to do. The command line prints it and exits with status 2."""


def first_line(error):
  """The first line of an exception's message, cut at 200 characters; its kind where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def note(text):
  """One line for the user beside the results: on stderr, at once."""
  print(text, file=sys.stderr, flush=True)
