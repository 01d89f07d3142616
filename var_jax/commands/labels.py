"""Classes on a command line: numbers, ranges, names and `all`, with commas between them."""

import difflib
import re
import unicodedata

from var_jax import workdir as workdir_lib
from var_jax.errors import UserError

WAYS = 'ranges such as 0-9, names, or all; a number is always a label, so write name:10 for a class that is called 10'


def find(text, classes, names, flag='--labels'):
  """Labels, a list of int, of a text such as 'cat,dog', '0-9', '0,3,7', 'all', or 'cat,0-3'.

  classes: how many there are; names: of them, or None. A name may hold commas. UserError for a class that does not
  exist, with names that are near.
  """
  table = {}
  for label, name in enumerate(names or ()):
    table.setdefault(_plain(name), []).append(label)
  most = 1 + max((name.count(',') for name in table), default=0)
  labels, words = [], text.split(',')
  while words:
    joined = {count: _plain(','.join(words[:count])) for count in range(min(most, len(words)), 0, -1)}
    count = next((count for count, name in joined.items() if _without_prefix(name) in table), 1)
    labels += _labels(joined[count], classes, table, flag)
    words = words[count:]
  return labels


def of_workdir(text, workdir, flag='--labels'):
  """Labels of a text, see `find`, as the generator in a workdir has them. Nothing but its config is read."""
  config = workdir_lib.read_config(workdir)
  if 'classes' not in config.model:
    raise UserError(f'{workdir} holds a tokenizer, which has no classes: give the workdir of a generator')
  return find(text, config.model.classes, workdir_lib.class_names(workdir), flag)


def one_of_workdir(text, workdir, flag='--label'):
  """[label] of a text that is to name a single class."""
  labels = of_workdir(text, workdir, flag)
  if len(labels) != 1:
    raise UserError(f'{flag}={text} names {len(labels)} classes: give one')
  return labels


def _labels(word, classes, table, flag):
  """Labels of one word. table: {name: labels}."""
  if re.fullmatch(r'[+-]?\d+', word):
    return [_checked(word, classes)]
  if found := re.fullmatch(r'(\d+) *- *(\d+)', word):
    first, last = (_checked(number, classes) for number in found.groups())
    if first > last:
      raise UserError(f'{flag}: the range {word} is empty, write {last}-{first}')
    return range(first, last + 1)
  if word == 'all':
    return range(classes)
  labels = table.get(_without_prefix(word), ())
  if len(labels) > 1:
    raise UserError(f'{flag}: {len(labels)} classes are called {word!r}, give the label: one of '
                    f'{", ".join(map(str, labels))}')
  if not labels:
    raise UserError(f'{flag}: there is no class {word!r}{_near(word, table)}; give whole numbers from 0 to '
                    f'{classes - 1}, {WAYS}')
  return labels


def _checked(number, classes):
  """A label of its digits."""
  label = int(number[:20])
  if not 0 <= label < classes:
    raise UserError(f'label {label} does not exist: this model has the classes 0 to {classes - 1}')
  return label


def _near(word, table):
  """' (near: cat, car)' of names that a word may have meant."""
  if not table:
    return ', and the names of the classes are not kept here'
  by_small_letters = {name.casefold(): name for name in table}
  near = difflib.get_close_matches(_without_prefix(word).casefold(), by_small_letters, cutoff=0.5)
  return f' (near: {", ".join(by_small_letters[name] for name in near)})' if near else ''


def _without_prefix(word):
  return word.removeprefix('name:').strip()


def _plain(name):
  """A name without spaces around it, its accents in one form: macOS writes them in another."""
  return unicodedata.normalize('NFC', name.strip())
