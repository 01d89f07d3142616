"""Compiles the published recipes for several TPU pods with compile_check.py, and prints the table of what they need.

Goes on where it was stopped: programs that --results has are not compiled again. One takes some minutes, all some
hours. --show prints the table of what is there.
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

import contextlib
import json
import pathlib
import subprocess
import sys

from var_jax import progress
from var_jax.commands import flags, output, script
from var_jax.errors import UserError, first_line

SMALL, LARGE = 'experiments/imagenet256.py', 'experiments/imagenet512.py'
GENERATORS = {f'd{depth}': f'{SMALL}:generator,depth={depth}' for depth in (16, 20, 24, 30)}
GENERATORS['d36, 512 px'] = f'{LARGE}:generator'
TOKENIZERS = {'tokenizer, 256 px': f'{SMALL}:tokenizer', 'tokenizer, 512 px': f'{LARGE}:tokenizer'}
PODS = {  # config.accumulate for each generator and tokenizer: how often a chip takes a part of its images
    'v5e:4x4': (2, 2, 3, 8, 24, 16, 16), 'v5e:16x16': (1, 1, 1, 1, 3, 1, 1), 'v4:2x2x4': (1, 1, 2, 4, 12, 8, 8),
    'v5p:2x2x2': (1, 1, 1, 2, 6, 6, 8), 'v6e:4x4': (1, 1, 2, 4, 12, 8, 8)}
IMAGES_DRAWN = {'d36, 512 px': 4}  # by a chip at a time; 8 of the others


def programs():
  """{(row, pod): arguments of compile_check.py}, in the order of the table's rows."""
  found = {}
  for number, (name, config) in enumerate((GENERATORS | TOKENIZERS).items()):
    for pod, accumulate in PODS.items():
      found[f'{name}: train', pod] = [f'--config={config}', f'--config.accumulate={accumulate[number]}']
  for name, config in GENERATORS.items():
    for pod in PODS:
      found[f'{name}: sample', pod] = [f'--config={config}', '--program=sample',
                                       f'--per_device={IMAGES_DRAWN.get(name, 8)}']
  return {(row, pod): [*arguments, f'--topology={pod}', '--json'] for (row, pod), arguments in found.items()}


def main(arguments):
  parser = flags.Parser('launch/compile_table.py', __doc__, 'python launch/compile_table.py --results=runs/pods.jsonl')
  parser.add_argument('--results', required=True, metavar='FILE.jsonl', help='one line for each program')
  parser.add_argument('--only', metavar='TEXT', help='compile none whose row and pod do not have it')
  parser.add_argument('--show', action='store_true', help='compile nothing')
  options = parser.parse_args(arguments)
  path = pathlib.Path(options.results)
  if options.show and not path.exists():
    raise UserError(f'there is no {path} to show: leave out --show to compile, or give another --results')
  if not options.show:
    output.make_folder(path.parent, '--results')
  found = read(path)
  wanted = [key for key in programs() if (options.only or '') in ' '.join(key)]
  if not wanted:
    raise UserError(f'--only={options.only} is in no row and pod, such as "{" ".join(next(iter(programs())))}"')
  missing = [key for key in wanted if key not in found]
  for row, pod in [] if options.show else progress.bar(missing, title='compile', unit='program'):
    found[row, pod] = compiled(row, pod)
    with path.open('a') as file:
      file.write(json.dumps(found[row, pod]) + '\n')
  print(table(found))


def read(path):
  """{(row, pod): figures} of a file of results; of other settings than ours, and of lines cut short, nothing."""
  found = {}
  try:
    lines = path.read_text().splitlines() if path.exists() else []
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read --results={path} ({first_line(error)}): give a file of an earlier run, or a new '
                    'one') from error
  for line in lines:
    with contextlib.suppress(ValueError, KeyError, TypeError):
      figures = json.loads(line)
      key = figures['row'], figures['topology']
      if figures['program'] == 'sample' or f'--config.accumulate={figures["accumulate"]}' in programs().get(key, []):
        found[key] = figures
  if lines and not found:
    raise UserError(f'--results={path} has no results of this table: give a file of an earlier run, or a new one')
  return found


def compiled(row, pod):
  """What compile_check.py says of one program. UserError when it fails."""
  command = [sys.executable, str(pathlib.Path(__file__).with_name('compile_check.py')), *programs()[row, pod]]
  ran = subprocess.run(command, capture_output=True, text=True)
  if not ran.stdout.strip().startswith('{'):
    raise UserError(f'{row} on {pod} failed: {(ran.stderr.strip() or "no output").splitlines()[-1]}')
  return {'row': row} | json.loads(ran.stdout.splitlines()[-1])


def table(found):
  """Markdown: a row for each program, a column for each pod."""
  lines = ['| | ' + ' | '.join(PODS) + ' |', '|---|' + '---|' * len(PODS)]
  for row in dict.fromkeys(row for row, _ in programs()):
    lines += [f'| {row} | ' + ' | '.join(cell(found.get((row, pod))) for pod in PODS) + ' |']
  return '\n'.join(lines)


def cell(figures):
  if figures is None:
    return ''
  if not figures['fits']:
    needs = figures.get('peak_gib') or figures.get('needs_gib')
    return f'no: {needs:.1f} GiB' if needs else 'no'
  images = figures['images'] // figures['chips'] // figures['accumulate']
  return f'{figures["share_of_memory"]:.0%}, {images}, {figures["mfu_ceiling"]:.0%}'.replace('%', ' %')


if __name__ == '__main__':
  script.run(main)
