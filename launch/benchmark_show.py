"""The figures of benchmark.py: in files, as a table and as a picture."""

import json
import pathlib

from var_jax.commands import output
from var_jax.errors import UserError

OURS = 'var_jax'
BY_SIZE = {128: 'sample d16, batch 1, 128 px', 256: 'sample d16, batch 1', 512: 'sample d16, batch 1, 512 px'}
BY_BATCH = {batch: f'sample d16, batch {batch}' for batch in (1, 4, 16)}


def begun(out, by):
  """(--out as a path, whose folder is there, figures that it has). UserError where those are of another library."""
  path = pathlib.Path(out)
  if path.is_dir():
    raise UserError(f'--out={path} is a folder: name a file in it, such as {path}/benchmark.json')
  found = read(path if path.exists() else None)
  others = {row.get('by', OURS) for row in found.values()} - {by}
  if others:
    raise UserError(f'--out={path} has figures of {", ".join(others)}, these are of {by}: name another file')
  output.make_folder(path.parent)
  return path, found


def read(path):
  """{row: figures} of an earlier run; {} without a path."""
  try:
    found = json.loads(pathlib.Path(path).read_text()) if path else {}
    if not isinstance(found, dict) or not all(isinstance(row, dict) and 'seconds' in row for row in found.values()):
      raise ValueError('no rows of figures')
    return found
  except (OSError, ValueError) as error:
    raise UserError(f'{path} has no figures of an earlier run ({error}): name another file') from error


def table(found, old):
  """Markdown: a row for each program; ratio: how many times as fast as in the old figures, where these have it."""
  lines = ['| | images/s | GFLOP/s | of the product | memory | compile |' + (' ratio |' if old else ''),
           '|---|---|---|---|---|---|' + ('---|' if old else '')]
  for name, row in found.items():
    if 'gflops' not in row:
      share = (f'{row["share_of_plain"]:.0%} of Pillow\'s' if 'share_of_plain' in row else
               f'{row["share_beyond_step"]:.0%} beyond the step')
      lines.append(f'| {name} | {row["images_per_second"]:.0f} | | {share} | | |'.replace('%', ' %') + ' |' * bool(old))
      continue
    line = (f'| {name} | {row["images_per_second"]:.3g} | {row["gflops_per_second"]:.0f} | '
            f'{row["share_of_product"]:.0%} | ')
    if 'compile_seconds' in row:
      memory = (row['arguments_mib'] + row['temporaries_mib'] + row['output_mib']) / 1024
      line += f'{memory:.2f} GiB | {row["compile_seconds"]:.0f} s |'
    else:
      line += '| |'
    if old:
      line += f' {old[name]["seconds"] / row["seconds"]:.2f}x |' if name in old else ' |'
    lines.append(line.replace('%', ' %'))
  return '\n'.join(lines)


def check_plotted(rows):
  """Raises UserError where rows of the picture are missing."""
  missing = sorted({*BY_SIZE.values(), *BY_BATCH.values()} - rows)
  if missing:
    raise UserError(f'--plot needs rows that --out does not have ({"; ".join(missing)}): add --only="sample d16", or '
                    'leave --only away')


def plot(found, path, tokens):
  """Seconds of an image against its side, with its tokens, and against the batch. tokens: {side: how many}."""
  from matplotlib.figure import Figure

  seconds = lambda rows: [found[name]['seconds'] for name in rows.values()]
  figure = Figure(figsize=(9, 3.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  left.loglog(list(BY_SIZE), seconds(BY_SIZE), 'o-')
  for size, took in zip(BY_SIZE, seconds(BY_SIZE)):
    left.annotate(f'{tokens[size]} tokens, {tokens[size] / took:.0f}/s', (size, took), (4, -12),
                  textcoords='offset points', fontsize=8)
  left.set(xlabel='side of the image, px', ylabel='seconds for one image', xlim=(110, 1100))
  left.set_ylim(min(seconds(BY_SIZE)) / 2, max(seconds(BY_SIZE)) * 2)
  left.set_xticks(list(BY_SIZE), [str(size) for size in BY_SIZE])
  left.set_yticks(seconds(BY_SIZE), [f'{took:.1f}' for took in seconds(BY_SIZE)])
  left.minorticks_off()
  each = [took / batch for batch, took in zip(BY_BATCH, seconds(BY_BATCH))]
  right.plot(list(BY_BATCH), each, 'o-')
  right.set(xlabel='batch', ylabel='seconds an image', ylim=(0, 1.2 * max(each)), xticks=list(BY_BATCH))
  figure.suptitle('d16 with guidance and decoder, ' + found['sample d16, batch 1']['machine'], fontsize=10)
  figure.savefig(path, dpi=110)
