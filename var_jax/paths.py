"""Where every path of a person comes in: flags, settings and `var_jax.load` call `local`, and nothing else does."""

import os
import re
import urllib.parse

from var_jax.errors import UserError

# pathlib makes one slash of two, so for storage that is in use one will do.
URL = re.compile(r'([a-z][a-z0-9+.-]*)://|(gs|s3|hf|https?|ftp|az|abfss?|hdfs|file):/', re.IGNORECASE)
LONGEST_NAME, LONGEST = 255, 4095  # bytes that Linux takes for a name and for a path


def local(path):
  """A path of this machine as a str: ~ and ~user are the home, file:// is left out, the rest stays as it is.

  UserError for other addresses (such as gs://, which are not read yet), an unknown ~user, a NUL byte, a name or a path
  that is too long, and what is no path. Environment variables are the shell's.
  """
  try:
    text = os.fsdecode(path)
  except TypeError:
    raise UserError(f'{path!r} is no path: give a str or a pathlib.Path') from None
  if '\0' in text:
    raise UserError(f'{text!r} has a NUL byte, which no path can have: check where it comes from')
  if found := URL.match(text):
    text = _from_url(text, (found[1] or found[2]).lower())
  if text.startswith('~'):
    text = _from_home(text)
  if len(os.fsencode(text)) > LONGEST or max(len(os.fsencode(name)) for name in text.split('/')) > LONGEST_NAME:
    raise UserError(f'{text[:60]}... is too long for a path: at most {LONGEST_NAME} bytes a name, {LONGEST} in all')
  return text


def locals_of(text):
  """'FILE,FILE' with `local` of each; a file whose name has a comma is one when it is there."""
  whole = local(text) if ',' not in text or URL.match(text) else text
  return whole if os.path.exists(whole) else ','.join(map(local, whole.split(',')))


def _from_url(text, scheme):
  """The path of a file:// address. UserError for any other: this is what has to change to read gs:// and its kin."""
  if scheme != 'file':
    raise UserError(f'{text} is an address, and storage at {scheme}:// is not read yet: give a path of this machine, '
                    'such as that of a copy or of a mounted bucket')
  host, path = re.match(r'file:/(?:/([^/]*))?(.*)', text, re.IGNORECASE | re.DOTALL).groups()
  path = path if host is not None else f'/{path}'
  if host not in (None, '', 'localhost') or not path:
    raise UserError(f'{text} names no file of this machine: write file:///PATH, or the path alone')
  return urllib.parse.unquote(path)


def _from_home(text):
  expanded = os.path.expanduser(text)
  if expanded == text and not os.path.lexists(text):
    raise UserError(f'there is no user {text[1:].partition("/")[0]!r}, whose home {text} would be in: check the name, '
                    f'or write ./{text}')
  return expanded
