"""The one exception that a person is meant to read."""


class UserError(Exception):
  """Bad input: one line that says what is wrong and what to do. The command line prints it and exits with status 2."""
