"""Which guidance and filters draw best? Every combination is drawn with one seed and evaluated."""

import itertools

from var_jax import pictures
from var_jax.errors import UserError

LOWER_IS_BETTER = ('fid', 'classifier_frechet_distance')


def parse(text):
  """'cfg=1,1.5;top_p=0.9,0.96' -> [{'cfg': 1.0, 'top_p': 0.9}, ...], all combinations. UserError for anything else."""
  kinds, axes = {'cfg': float, 'top_k': int, 'top_p': float, 'temperature': float}, {}
  for part in text.split(';'):
    name, _, values = part.partition('=')
    if name not in kinds:
      raise UserError(f'--grid has no axis {name!r}: use some of {", ".join(kinds)}, as in "cfg=1,1.5;top_p=0.9,0.96"')
    if name in axes:
      raise UserError(f'--grid names {name} twice: give its values in one list, as in "{name}={values},..."')
    try:
      axes[name] = [kinds[name](value) for value in values.split(',')]
    except ValueError:
      raise UserError(f'--grid: {values!r} is no list of numbers for {name}') from None
  return [dict(zip(axes, point)) for point in itertools.product(*axes.values())]


def best(rows):
  """The row with the best Fréchet distance."""
  name = figure_of(rows)
  return min(rows, key=lambda row: row[name])


def figure_of(rows):
  """Name of the figure that rows are compared by."""
  return next(name for name in LOWER_IS_BETTER if name in rows[0])


def table(points, rows):
  """Rows as lines of text: the settings, then the figures that differ between points."""
  varying = [name for name in rows[0] if name not in points[0] and len({str(row[name]) for row in rows}) > 1]
  names = [*points[0], *varying]
  lines = ['  '.join(f'{name[:14]:>14}' for name in names)]
  for row in rows:
    lines.append('  '.join(f'{row[name]:14.4g}' if isinstance(row[name], (int, float)) else f'{row[name]!s:>14}'
                           for name in names))
  return '\n'.join(lines)


def plot(path, points, rows):
  """A picture of the figure over the first axis, a line for each combination of the others."""
  (first, *others), name, lines = points[0], figure_of(rows), {}
  for row in rows:
    label = ', '.join(f'{other} {row[other]:g}' for other in others)
    lines.setdefault(label, []).append((row[first], row[name]))
  pictures.plot(path, {label: sorted(line) for label, line in lines.items()}, first, name.replace('_', ' '))
