"""Trains every point of an experiment's `sweep()`, and compares them in a table, a CSV and a plot.

Each point is a workdir in --workdir, named after its settings; settings given here hold for all of them. What is
finished is skipped, so that the same command goes on after an interruption. --emit prints commands for other machines
in place of running them; --table only compares what is there. Exit status 1 when a point failed or none has the
metric.
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

  from var_jax.commands import script
  script.stop_at_once()

import csv
import json
import pathlib
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

from var_jax import pictures, progress
from var_jax.commands import experiment, flags, script
from var_jax.errors import UserError, note
from var_jax.training import metrics, processes


class Point(NamedTuple):
  """A workdir, the settings that make it differ from the others, and the arguments of `python -m var_jax` for it."""

  workdir: pathlib.Path
  settings: dict
  arguments: list

  @property
  def finished(self):
    return (self.workdir / 'finished').exists()

  def shell(self, python):
    """One line for a shell, which says as well when the point is finished."""
    command = shlex.join([python, '-m', 'var_jax', *self.arguments])
    return f'{command} && touch {shlex.quote(str(self.workdir / "finished"))}'


def main(arguments):
  parser = flags.Parser('launch/sweep.py', __doc__, 'python launch/sweep.py --config=experiments/digits.py:generator '
                        '--workdir=runs/sweep --config.tokenizer=runs/digits/tokenizer')
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='as for training; FILE has a sweep()')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='where the points are kept')
  parser.add_argument('--config.NAME', dest='unused', metavar='VALUE', help='a setting of all points')
  parser.add_argument('--jobs', type=int, default=1, metavar='N', help='points at a time (default 1)')
  parser.add_argument('--metric', metavar='NAME', help="a scalar of metrics.jsonl, '-' before it if higher is better "
                      '(default: validation/loss, of a tokenizer -validation/psnr)')
  parser.add_argument('--table', action='store_true', help='only compare what is there')
  parser.add_argument('--emit', choices=sorted(EMITTERS), help='print what trains the points that are not finished')
  parser.add_argument('--image', metavar='NAME', help='for --emit=kubernetes: a container with var_jax installed')
  parser.add_argument('--volume', metavar='CLAIM:/PATH', help='for --emit=kubernetes: a volume that has --workdir')
  options, overrides = parser.parse_known_args(arguments)
  flags.in_range('--jobs', options.jobs, 1)
  folder = pathlib.Path(options.workdir)
  if options.emit == 'kubernetes':
    check_volume(options)
  if options.table and not folder.is_dir():
    raise UserError(f'there is no --workdir={folder} to compare: leave out --table to train, or check the path')
  points, stage = points_of(options.config, options.workdir, overrides)
  waiting = [point for point in points if not point.finished]
  if not waiting:
    note(f'all {len(points)} points are finished')
  if options.emit:
    print(EMITTERS[options.emit](waiting, options) if waiting else '')
    return 0
  statuses, stop = ([], None) if options.table else run(waiting, options.jobs)
  metric = options.metric or {'generator': 'validation/loss', 'tokenizer': '-validation/psnr'}[stage]
  compared = compare(folder, points, metric)
  if stop:
    note('stopped; the same command goes on from there')
    return 128 + stop
  return 1 if any(statuses) or not compared else 0


def check_volume(options):
  """Raises UserError when Kubernetes' pods would lack what they need, or would write where nothing is kept."""
  claim, _, path = (options.volume or '').partition(':')
  if not (options.image and claim and path.startswith('/')):
    raise UserError('--emit=kubernetes needs a container and a volume: add --image=NAME --volume=CLAIM:/PATH')
  if not pathlib.Path(options.workdir).is_relative_to(path):
    raise UserError(f'--workdir={options.workdir} is outside of the volume, and would be lost: write {path}/...')


def points_of(config, workdir, overrides):
  """(the points of a config's file, its stage). UserError for a file without any, or settings that do not exist."""
  stage, file = flags.read_config(config, overrides).stage, config.partition(':')[0]
  module = experiment.load(file)
  if not hasattr(module, 'sweep'):
    raise UserError(f'{file} has no sweep(): let it return points such as configs.grid({{"optimizer.peak_lr": (1e-3, '
                    '2e-3)}), see experiments/digits.py')
  with experiment.running(module.__file__):
    listed = module.sweep()
    named = dict(listed) if isinstance(listed, dict) else {name_of(settings): settings for settings in listed}
    named = {str(name).replace('/', '_'): dict(settings) for name, settings in named.items()}
  if not named or len(named) < len(listed):
    raise UserError(f'sweep() in {file} lists no points, or two of one name: name them: {{"slow": {{"seed": 1}}}}')
  swept = {f'config.{setting}' for settings in named.values() for setting in settings}
  if fixed := swept & set(flags.given(overrides)):
    raise UserError(f'--{fixed.pop()} is what sweep() in {file} varies: leave it out, or change sweep()')
  points = []
  for name, settings in named.items():
    own = [*overrides, *(f'--config.{setting}={value}' for setting, value in settings.items())]
    flags.read_config(config, own)
    place = pathlib.Path(workdir) / name
    points.append(Point(place, settings, ['train', f'--config={config}', f'--workdir={place}', *own]))
  return points, stage


def name_of(settings):
  """A folder's name for a point: 'peak_lr=0.001,label_drop=0.1'."""
  words = [f'{setting.rpartition(".")[2]}={value}' for setting, value in settings.items()]
  return ','.join(words).replace(' ', '')


def run(points, jobs):
  """Trains points, some at a time. (exit statuses, the signal that asked to stop or None).

  Ctrl-C and SIGTERM are handed on as SIGTERM, so that every point saves before it ends.
  """
  statuses, running, queue = [], [], list(points)
  with processes.stop_requests() as stop, progress.bar(title='sweep', unit='point', total=len(points), delay=0) as bar:
    while running or queue and not stop:
      while queue and len(running) < jobs and not stop:
        running.append((queue[0], _start(queue.pop(0))))
      time.sleep(0.2)
      if stop:
        for _, process in running:
          process.terminate()
        for _, process in running:
          process.wait()
      for point, process in list(running):
        if process.poll() is not None:
          running.remove((point, process))
          statuses.append(_ended(point, process.returncode))
          bar.update()
  return statuses, stop[0] if stop else None


def _start(point):
  try:
    point.workdir.mkdir(parents=True, exist_ok=True)
    with (point.workdir / 'log.txt').open('a') as log:
      # In a session of its own, so that Ctrl-C reaches it only through us.
      return subprocess.Popen([sys.executable, '-m', 'var_jax', *point.arguments], stdout=log,
                              stderr=subprocess.STDOUT, start_new_session=True)
  except OSError as error:
    raise UserError(f'cannot write to {point.workdir} ({error.strerror}): choose another --workdir') from None


def _ended(point, status):
  """Marks a finished point, says why another is not; returns the status."""
  log = point.workdir / 'log.txt'
  if status == 0:
    (point.workdir / 'finished').touch()
  elif not 128 < status < 160:  # 128 + a signal: it was told to stop, and saved
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    note(f'{point.workdir.name} failed with status {status}: {lines[-1] if lines else "without a word"} (see {log})')
  return status


def compare(folder, points, metric):
  """Prints a table of the points, the best first, and writes `sweep.csv` and `sweep.png`. False when there is none."""
  name, sign = metric.removeprefix('-'), -1 if metric.startswith('-') else 1
  scalars = {point.workdir.name: metrics.read(point.workdir / 'metrics.jsonl') for point in points}
  series = {point: found.get(name, []) for point, found in scalars.items()}
  measured = sorted((p for p in points if series[p.workdir.name]), key=lambda p: sign * series[p.workdir.name][-1][1])
  if not measured:
    others = sorted({scalar for found in scalars.values() for scalar in found})
    note(f'no point has a {name}' + (f': choose a --metric of {", ".join(others)}' if others else ' yet'))
    return False
  settings = list({setting: None for point in points for setting in point.settings})
  header = ['point', *settings, name, 'step', 'finished']
  rows = [[p.workdir.name, *(p.settings.get(s, '') for s in settings), series[p.workdir.name][-1][1],
           series[p.workdir.name][-1][0], 'yes' if p.finished else 'no'] for p in measured]
  with (folder / 'sweep.csv').open('w', newline='') as file:
    csv.writer(file).writerows([header, *rows])
  cells = [[f'{cell:.5g}' if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
  widths = [max(len(cell) for cell in column) for column in zip(*cells)]
  for row in cells:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
  note(f'{folder}/sweep.csv, {folder}/sweep.png: {len(measured)} of {len(points)} points have a {name}')
  lines = {f'{p.workdir.name}  {series[p.workdir.name][-1][1]:.4g}': series[p.workdir.name] for p in measured}
  pictures.plot(folder / 'sweep.png', lines, 'step', name)
  return True


def _shell(points, options):
  """A line for each point, such as for `parallel` or `xargs -d '\\n' -I{} bash -c {}`."""
  return '\n'.join(point.shell(sys.executable) for point in points)


def _slurm(points, options):
  """A batch script whose array has a task for each point."""
  tasks = '\n'.join(f'  {i}) train() {{ srun {point.shell(sys.executable)}; }} ;;' for i, point in enumerate(points))
  return f'''#!/usr/bin/env bash
#SBATCH --job-name=sweep --array=0-{len(points) - 1}%{options.jobs} --gres=gpu:1 --signal=TERM@120 --requeue
# The points of {options.config} that are not finished; submit with sbatch, from the folder of this call.
case "$SLURM_ARRAY_TASK_ID" in
{tasks}
esac
status=0
train || status=$?
case $status in  # 128 + a signal: it was told to stop, and saved
  129|138|140|143) scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" ;;
esac
exit "$status"'''


def _kubernetes(points, options):
  """A list of jobs for `kubectl apply -f -`: a pod that is taken away comes again, bad input ends its job."""
  claim, _, path = options.volume.partition(':')
  jobs = []
  for i, point in enumerate(points):
    container = {'name': 'train', 'image': options.image, 'command': ['bash', '-c', point.shell('python')],
                 'volumeMounts': [{'name': 'runs', 'mountPath': path}],
                 'resources': {'limits': {'nvidia.com/gpu': 1}}}
    pod = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': 300, 'containers': [container],
           'volumes': [{'name': 'runs', 'persistentVolumeClaim': {'claimName': claim}}]}
    bad_input = {'action': 'FailJob', 'onExitCodes': {'containerName': 'train', 'operator': 'In', 'values': [2]}}
    jobs.append({'apiVersion': 'batch/v1', 'kind': 'Job',
                 'metadata': {'name': f'sweep-{i}', 'annotations': {'point': point.workdir.name}},
                 'spec': {'backoffLimit': 100, 'podFailurePolicy': {'rules': [bad_input]}, 'template': {'spec': pod}}})
  return json.dumps({'apiVersion': 'v1', 'kind': 'List', 'items': jobs}, indent=2)


EMITTERS = {'shell': _shell, 'slurm': _slurm, 'kubernetes': _kubernetes}


if __name__ == '__main__':
  script.run(main)
