"""What a person is meant to read: the one exception, what others said in a line, near misses, and notes."""

import difflib
import sys


class UserError(Exception):
  """Bad input: one line that says what is wrong and what to do. The command line prints it and exits with status 2."""

  def __init__(self, message):
    super().__init__(' '.join(str(message).splitlines()))  # a path or a value within may have line breaks


def first_line(error):
  """The first line of an exception's message, cut at 200 characters; its kind where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def did_you_mean(word, known, sign=''):
  """', did you mean NAME?' with the known name that is nearest to a word; '' where none is near.

  Of dotted names the last part alone will do. sign: what stands before every name.
  """
  plain = word.replace('-', '_')
  near = [name for name in known if name.endswith(f'.{plain}') or len(plain) > 2 and name.startswith(plain)]
  near = near or difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
  return f', did you mean {sign}{near[0]}?' if near else ''


def note(text):
  """One line for the user beside the results: on stderr, at once. A terminal that is gone ends no run."""
  try:
    print(text, file=sys.stderr, flush=True)
  except OSError:
    pass
