"""What a person is meant to read: the one exception, and notes."""

import sys


class UserError(Exception):
  """Bad input: one line that says what is wrong and what to do. The command line prints it and exits with status 2."""


def note(text):
  """One line for the user beside the results: on stderr, at once."""
  print(text, file=sys.stderr, flush=True)
