"""Several processes on this machine: they compute what one does, stop together, and say when one is missing."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from PIL import Image
from tiny_runs import ROOT, differing, metrics_of, train_both

from var_jax.__main__ import main
from var_jax.errors import UserError
from var_jax.training.processes import LOST, join

STEPS = ['--config.steps=8', '--config.eval_every=4', '--config.pictures_every=8', '--config.checkpoint_every=4',
         '--config.log_every=3']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return train_both(tmp_path_factory)


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def start(count, devices, trained, workdir, *options, only=None):
  """Processes that train the tiny generator together; only: the indices of those that come."""
  return together(count, devices, 'train', f'--config={trained[0]}:generator', f'--workdir={workdir}',
                  f'--config.tokenizer={trained[1]}', *STEPS, *options, only=only)


def together(count, devices, *arguments, only=None, own=()):
  """Processes that run one command together. own: the arguments that each has for itself."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices),
                              'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  command, port = [sys.executable, '-m', 'var_jax', *arguments], free_port()
  return [subprocess.Popen([*command, f'--distributed=127.0.0.1:{port},{count},{i}', *own[i:i + 1]], env=environment,
                           cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
          for i in (only or range(count))]


def finish(processes, timeout=300):
  """[(exit status, stderr)]."""
  try:
    return [(process.returncode, errors) for process in processes
            for errors in [process.communicate(timeout=timeout)[1]]]
  finally:
    for process in processes:
      process.kill()


def checkpoints_of(workdir):
  """Steps of what is saved."""
  return {int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()}


def restored(workdir):
  """Everything in the newest checkpoint, on one device, however many processes stored it."""
  path, here = workdir / 'checkpoints' / str(max(checkpoints_of(workdir))), SingleDeviceSharding(jax.devices()[0])
  like = lambda name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                                   ocp.metadata(path, checkpointable_name=name).metadata)
  return {name: ocp.load(path, like(name), checkpointable_name=name) for name in ('model', 'training')}


def numbers(workdir):
  return {(line['step'], name): value for line in metrics_of(workdir) for name, value in line.items()
          if 'per_second' not in name}


@pytest.mark.parametrize('how', [
    '127.0.0.1:abc,2,0', '127.0.0.1:99999,2,0', ':29560,2,0', '127.0.0.1,2,0', '127.0.0.1:29560,2'])
def test_nonsense_finds_no_processes(how):
  with pytest.raises(UserError, match='HOST:PORT,COUNT,INDEX'):
    join(how, timeout=5)


def test_port_in_use_is_told():
  with socket.create_server(('', 0)) as taken, pytest.raises(UserError, match='choose another'):
    join(f'127.0.0.1:{taken.getsockname()[1]},2,0', timeout=5)


@pytest.fixture(scope='module')
def alone(trained, tmp_path_factory):
  """The workdir of one process with the eight devices of the tests."""
  workdir = tmp_path_factory.mktemp('alone') / 'w'
  assert main(['train', f'--config={trained[0]}:generator', f'--workdir={workdir}', f'--config.tokenizer={trained[1]}',
               *STEPS]) == 0
  return workdir


@pytest.mark.parametrize('count, devices, sizes', [
    (2, 2, (1, 2, 2)), pytest.param(4, 1, (2, 1, 2), marks=pytest.mark.slow),
    pytest.param(2, 1, (2, 1, 1), marks=pytest.mark.slow)])
def test_processes_compute_what_one_does(trained, alone, tmp_path, count, devices, sizes):
  """Over a mesh whose tensor axis lies within a process, and one where it reaches over two."""
  mesh = [f'--config.mesh.{name}={size}' for name, size in zip(('data', 'fsdp', 'tensor'), sizes)]
  for status, errors in finish(start(count, devices, trained, tmp_path / 'w', *mesh)):
    assert status == 0, errors
  expected, found = numbers(alone), numbers(tmp_path / 'w')
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=str(name))
  pictures = [np.asarray(Image.open(w / 'pictures/samples_0000008.png')).astype(int) for w in (alone, tmp_path / 'w')]
  assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.slow
def test_signal_to_one_process_stops_and_saves_all(trained, alone, tmp_path):
  processes = start(2, 1, trained, tmp_path / 'w', '--config.steps=500', '--config.log_every=1',
                    '--config.eval_every=0', '--config.checkpoint_every=100')
  until = time.monotonic() + 200
  while not (tmp_path / 'w/metrics.jsonl').exists() and time.monotonic() < until:
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGTERM)
  ended = finish(processes)
  assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
  steps = {errors.partition('stopped at step ')[2].split()[0] for _, errors in ended}
  assert len(steps) == 1 and (tmp_path / 'w/checkpoints' / steps.pop()).exists()


def another_view(workdir, folder, spoil, steps):
  """A folder that shows a workdir as another host has it, to which some steps are spoilt."""
  (folder / 'checkpoints').mkdir(parents=True)
  for path in workdir.iterdir():
    if path.name != 'checkpoints':
      (folder / path.name).symlink_to(path)
  for path in (workdir / 'checkpoints').iterdir():
    if int(path.name) in steps:
      spoil(shutil.copytree(path, folder / 'checkpoints' / path.name))
    else:
      (folder / 'checkpoints' / path.name).symlink_to(path)
  return folder


def without_list(folder):
  (folder / 'training/_METADATA').unlink()


def shortened(folder):
  for file in folder.rglob('d/*'):
    file.write_bytes(file.read_bytes()[:10])


@pytest.mark.slow
@pytest.mark.parametrize('spoil', [shortened, without_list])
def test_processes_resume_on_the_newest_step_that_all_can_read(trained, alone, tmp_path, spoil):
  workdir = shutil.copytree(alone, tmp_path / 'w')
  assert checkpoints_of(workdir) == {4, 8}
  views = [workdir, another_view(workdir, tmp_path / 'other', spoil, [8])]
  ended = finish(together(
      2, 1, 'train', f'--config={trained[0]}:generator', f'--config.tokenizer={trained[1]}', *STEPS, '--config.steps=4',
      own=[f'--workdir={view}' for view in views]))
  for status, errors in ended:
    assert status == 0 and 'resuming from step 4 of 4' in errors, errors
    assert 'checkpoint 8' in errors and 'on process 1 of 2' in errors and 'Traceback' not in errors


def test_processes_without_a_step_that_all_can_read_are_to_be_started_again(trained, alone, tmp_path):
  """Bad input is what all see alike: launchers take its exit status for final."""
  workdir = shutil.copytree(alone, tmp_path / 'w')
  views = [workdir, another_view(workdir, tmp_path / 'other', shortened, [4, 8])]
  for status, errors in finish(together(
      2, 1, 'train', f'--config={trained[0]}:generator', f'--config.tokenizer={trained[1]}', *STEPS,
      own=[f'--workdir={view}' for view in views])):
    assert status == LOST and 'error: none of the checkpoints [4, 8]' in errors and 'Traceback' not in errors, errors


@pytest.mark.slow
def test_processes_sample_and_evaluate_as_one(alone, tmp_path):
  """The file is whole when they end, though one of them alone writes it."""
  flags = [f'--workdir={alone}', '--batch_size=4']
  assert main(['sample', *flags, '--num=10', f'--out={tmp_path}/one.npz']) == 0
  assert main(['evaluate', *flags, '--per_class=3', f'--out={tmp_path}/one.json']) == 0
  for command in (['sample', *flags, '--num=10', f'--out={tmp_path}/two.npz'],
                  ['evaluate', *flags, '--per_class=3', f'--out={tmp_path}/two.json']):
    for status, errors in finish(together(2, 2, *command)):
      assert status == 0, errors
  one, two = (np.load(tmp_path / f'{name}.npz') for name in ('one', 'two'))
  assert np.array_equal(one['tokens'], two['tokens']) and np.array_equal(one['labels'], two['labels'])
  assert np.abs(one['arr_0'].astype(int) - two['arr_0']).max() <= 1
  one, two = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'two'))
  assert one == pytest.approx(two, rel=1e-4) and 'validation_loss' in one


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(trained, tmp_path):
  """SIGKILL to one process or both, while they start, train and save: the run resumes and ends as if never killed."""
  options = ['--config.steps=160', '--config.checkpoint_every=2', '--config.log_every=1', '--config.eval_every=0']
  for status, errors in finish(start(2, 1, trained, tmp_path / 'straight', *options)):
    assert status == 0, errors
  draw, killed, saved = random.Random(0), tmp_path / 'killed', []
  for kill in range(30):
    processes, before = start(2, 1, trained, killed, *options), checkpoints_of(killed)
    until = time.monotonic() + 120
    if kill % 5:  # else while they start
      while checkpoints_of(killed) == before and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 2 if kill % 5 else 10))
    for victim in draw.choice([[0], [1], [0, 1]]):
      processes[victim].kill()
    ended = finish(processes, timeout=150)
    statuses = [status for status, _ in ended]
    # jax itself aborts when the first process, which keeps the others together, is the one that died.
    assert set(statuses) <= {-signal.SIGKILL, LOST, -signal.SIGABRT} and -signal.SIGKILL in statuses, ended
    saved.append(max(checkpoints_of(killed), default=0))
    assert saved == sorted(saved), saved
  assert saved[-1] < 160, 'it was done before the last kill'
  for status, errors in finish(start(2, 1, trained, killed, *options)):
    assert status == 0, errors
  assert len(set(saved)) > 15, saved
  assert numbers(killed) == numbers(tmp_path / 'straight')
  assert differing(*(restored(w) for w in (killed, tmp_path / 'straight'))) == []


def test_missing_process_is_told(trained, tmp_path):
  (status, errors), = finish(start(2, 1, trained, tmp_path / 'w', '--join_timeout=5', only=[0]), timeout=120)
  assert status == LOST and 'did not all join within 5 seconds' in errors and 'Traceback' not in errors
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_process_that_dies_stops_the_others(trained, tmp_path):
  processes = start(2, 1, trained, tmp_path / 'w', '--config.steps=100000', '--config.log_every=1',
                    '--config.eval_every=0')
  until = time.monotonic() + 200
  while not list((tmp_path / 'w').glob('checkpoints/4')) and time.monotonic() < until:
    time.sleep(0.1)
  processes[1].kill()
  status, errors = finish(processes, timeout=150)[0]
  assert status == LOST and 'error: ' in errors and 'Traceback' not in errors, errors


def test_nonsense_is_refused(capsys, trained, tmp_path):
  for how in ('nonsense', '127.0.0.1:1,two,0', 'auto'):
    assert main(['train', f'--config={trained[0]}', f'--workdir={tmp_path / "w"}', f'--distributed={how}']) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and '--distributed' in error and '\n' not in error
