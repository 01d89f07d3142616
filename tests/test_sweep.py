"""Sweeps: their points, what is run and what is skipped, with a stand-in for `python -m var_jax`."""

import csv
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import ROOT

from var_jax import configs

EXPERIMENT = '''
from var_jax import configs

def get_config(argument='generator'):
  return configs.generator()

def sweep():
  return {points}
'''
# Writes the loss that its seed has in `losses.json`, or waits to be stopped, or fails.
STAND_IN = '''
import json, pathlib, signal, sys, time
settings = dict(word[2:].split('=', 1) for word in sys.argv[2:])
with open('calls', 'a') as file:
  file.write(settings['config.seed'] + ' ')
loss = json.loads(pathlib.Path('losses.json').read_text())[settings['config.seed']]
if loss == 'wait':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  pathlib.Path('ready').touch()
  time.sleep(60)
if loss == 'fail':
  sys.exit('error: no such luck')
line = {'step': 7, 'validation/loss': loss}
(pathlib.Path(settings['workdir']) / 'metrics.jsonl').write_text(json.dumps(line))
'''


@pytest.fixture
def place(tmp_path):
  (tmp_path / 'var_jax').mkdir()
  (tmp_path / 'var_jax/__main__.py').write_text(STAND_IN)  # python -m looks into the current folder first
  return tmp_path


def start(place, points, losses, *flags):
  (place / 'experiment.py').write_text(EXPERIMENT.format(points=points))
  (place / 'losses.json').write_text(json.dumps(losses))
  return subprocess.Popen(
      [sys.executable, ROOT / 'launch/sweep.py', '--config=experiment.py:generator', '--workdir=runs', *flags],
      cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(*arguments):
  """(exit status, output, errors)."""
  process = start(*arguments)
  out, errors = process.communicate(timeout=60)
  return process.returncode, out, errors


def calls(place):
  return (place / 'calls').read_text().split() if (place / 'calls').exists() else []


def test_points_of_grids_and_pairs():
  """All combinations, the last changing fastest; pairs of unequal length would lose some."""
  assert configs.grid({'a': (1, 2), 'b.c': (3, 4)}) == [
      {'a': 1, 'b.c': 3}, {'a': 1, 'b.c': 4}, {'a': 2, 'b.c': 3}, {'a': 2, 'b.c': 4}]
  assert configs.zipped({'a': (1, 2), 'b': (3, 4)}) == [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
  with pytest.raises(ValueError):
    configs.zipped({'a': (1, 2), 'b': (3,)})


def test_points_are_trained_and_compared(place):
  """The best first, whatever the order; settings in the CSV; the plot is a picture."""
  status, out, errors = sweep(place, 'configs.grid({"seed": (1, 2, 3)})', {'1': 0.3, '2': 0.1, '3': 0.2}, '--jobs=2')
  assert status == 0 and sorted(calls(place)) == ['1', '2', '3'], errors
  rows = list(csv.reader((place / 'runs/sweep.csv').open()))
  assert rows == [['point', 'seed', 'validation/loss', 'step', 'finished'], ['seed=2', '2', '0.1', '7', 'yes'],
                  ['seed=3', '3', '0.2', '7', 'yes'], ['seed=1', '1', '0.3', '7', 'yes']]
  assert [line.split() for line in out.splitlines()] == rows
  assert (place / 'runs/sweep.png').read_bytes().startswith(b'\x89PNG')
  assert '3 of 3 points have a validation/loss' in errors
  status, out, _ = sweep(place, 'configs.grid({"seed": (1, 2, 3)})', {}, '--table', '--metric=-validation/loss')
  assert status == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ['seed=1', 'seed=3', 'seed=2']
  status, _, errors = sweep(place, 'configs.grid({"seed": (1, 2, 3)})', {}, '--table', '--metric=psnr')
  assert status == 1 and 'choose a --metric of validation/loss' in errors


def test_failed_point_does_not_stop_the_others_and_is_tried_again(place):
  points = '{"one": {"seed": 1}, "two": {"seed": 2}}'
  status, out, errors = sweep(place, points, {'1': 'fail', '2': 0.5})
  assert status == 1 and 'one failed with status 1: error: no such luck' in errors and 'two' in out
  status, _, _ = sweep(place, points, {'1': 0.4, '2': 0.5})
  assert status == 0 and calls(place) == ['1', '2', '1']  # what is finished is not run again
  assert sweep(place, points, {})[0] == 0 and calls(place) == ['1', '2', '1']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_sweep_stops_its_points_and_goes_on_later(place, number):
  """A point that were not told would train on, unseen."""
  points = 'configs.grid({"seed": (1, 2, 3)})'
  process = start(place, points, {'1': 0.1, '2': 'wait', '3': 0.3})
  until = time.monotonic() + 60
  while not (place / 'ready').exists() and time.monotonic() < until:
    time.sleep(0.01)
  process.send_signal(number)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 128 + number and 'goes on from there' in errors and calls(place) == ['1', '2']
  assert sweep(place, points, {'2': 0.2, '3': 0.3})[0] == 0 and calls(place) == ['1', '2', '2', '3']


def test_names_of_points_tell_them_apart(place):
  """And are names of folders, whatever the values."""
  points = '[{"optimizer.decay": .1, "data.path": "/a/b", "seed": 1}, {"optimizer.decay": .2, "data.path": "c"}]'
  _, out, _ = sweep(place, points, {}, '--emit=shell')
  assert re.findall(r'--workdir=(\S+)', out) == ['runs/decay=0.1,path=_a_b,seed=1', 'runs/decay=0.2,path=c']


def test_emitted_commands_train_the_points(place):
  """Run by a shell, one by one or as tasks of a Slurm array, they leave what the sweep itself would leave."""
  points = 'configs.grid({"seed": (1, 2)})'
  _, shell, _ = sweep(place, points, {'1': 0.1, '2': 0.2}, '--emit=shell')
  assert not calls(place)
  first, second = shell.splitlines()
  (place / 'runs/seed=1').mkdir(parents=True)
  subprocess.run(['bash', '-c', first], cwd=place, check=True)
  assert calls(place) == ['1'] and (place / 'runs/seed=1/finished').exists()
  _, script, _ = sweep(place, points, {'1': 0.1, '2': 0.2}, '--emit=slurm')
  assert '--array=0-0%1' in script  # the first is finished
  (place / 'runs/seed=2').mkdir()
  subprocess.run(['bash', '-c', f'srun() {{ "$@"; }}\n{script}'], cwd=place, check=True,
                 env={'SLURM_ARRAY_TASK_ID': '0', 'PATH': '/usr/bin:/bin'})
  assert calls(place) == ['1', '2'] and (place / 'runs/seed=2/finished').exists()
  _, out, errors = sweep(place, points, {}, '--emit=kubernetes', '--image=i', f'--volume=claim:{place}',
                         f'--workdir={place}/runs')
  assert not out.strip() and 'all 2 points are finished' in errors


def test_emitted_jobs_are_what_kubernetes_takes(place):
  """A pod that is taken away comes again, bad input ends its job, and the volume is where it was said."""
  _, out, _ = sweep(place, 'configs.grid({"seed": (1, 2)})', {}, '--emit=kubernetes', '--image=i', '--volume=c:/runs',
                    '--workdir=/runs/sweep')
  jobs = json.loads(out)['items']
  assert [job['metadata']['name'] for job in jobs] == ['sweep-0', 'sweep-1']
  pod = jobs[1]['spec']['template']['spec']
  (container,), (volume,) = pod['containers'], pod['volumes']
  assert container['image'] == 'i' and '--config.seed=2' in container['command'][-1]
  assert volume['persistentVolumeClaim'] == {'claimName': 'c'}
  assert container['volumeMounts'] == [{'name': volume['name'], 'mountPath': '/runs'}]
  assert pod['restartPolicy'] == 'Never' and jobs[1]['spec']['podFailurePolicy']['rules'][0]['action'] == 'FailJob'


@pytest.mark.parametrize('points, flags, words', [
    ('[]', (), 'no points'), ('1 / 0', (), 'ZeroDivisionError'), ('[1]', (), 'fails with'),
    ('[{"seed": 1}, {"seed": 1}]', (), 'two of one name'),
    ('[{"sede": 1}]', (), 'no such setting'), ('[{"seed": "x"}]', (), 'seed'),
    ('[{"seed": 1}]', ('--jobs=0',), 'out of range'), ('[{"seed": 1}]', ('--emit=kubernetes',), '--volume'),
    ('[{"seed": 1}]', ('--emit=kubernetes', '--image=i', '--volume=c:/runs'), 'outside of the volume'),
    ('[{"seed": 1}]', ('--table',), 'no --workdir'), ('[{"seed": 1}]', ('--config.nothing=1',), 'no such setting'),
    ('[{"seed": 1}, {"seed": 2}]', ('--config.seed=3',), '--config.seed is what')])
def test_bad_sweeps_are_refused(place, points, flags, words):
  """In one line, before anything is trained."""
  status, out, errors = sweep(place, points, {}, *flags)
  assert status == 2 and errors.count('\n') == 1 and errors.startswith('error: ') and words in errors, errors
  assert not out and not (place / 'runs').exists()
