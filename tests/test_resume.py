"""Runs that are stopped by a crash, a kill or a signal go on as if never stopped."""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import jax
import numpy as np
import pytest
from tiny_runs import (
  CERTAIN,
  FULL,
  ROOT,
  Line,
  Trainer,
  _stage,
  differing,
  farthest,
  metrics_of,
  moments,
  numbers,
  one_device,
  tiny_config,
  train_both,
  train_line,
)

from var_jax import lineage, lock, progress
from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.training import evaluation, loop, metrics
from var_jax.training import mesh as mesh_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.optimizer import rate_of

STEPS = 80  # of a run that is killed: the last of three signals has to come before its end


class Crash(Exception):
  """The machine went away."""


class CrashingCheckpoints(Checkpoints):
  """Checkpoints of a run that dies right after it has saved step 4."""

  def save(self, state, metadata):
    super().save(state, metadata)
    if int(state.step) == 4:
      self.finish()
      raise Crash


def run_losses(workdir):
  return [(line['step'], line['train/loss']) for line in metrics_of(workdir) if 'train/loss' in line]


# The killed run below is a tokenizer's.
@pytest.mark.parametrize('kind', [pytest.param('tokenizer', marks=pytest.mark.slow), 'generator'])
def test_resumed_run_equals_straight_run(kind, tmp_path, monkeypatch):
  changes = FULL if kind == 'tokenizer' else {}
  stage, first = Trainer(kind, **changes).stage, jax.devices()[:1]
  sources = [open_source('digits', split=split) for split in ('train', 'validation')]
  monkeypatch.setattr(jax, 'devices', lambda *_: first)  # eight would take longer to save, and prove no more

  def run(workdir, kind_of_checkpoints=Checkpoints):
    said = []
    with kind_of_checkpoints(workdir) as checkpoints:
      state = loop.train(stage, tiny_config(kind, **changes), *sources, checkpoints, workdir, say=said.append)
      return jax.device_get(state), said

  straight, said = run(tmp_path / 'a')
  assert said == []
  with pytest.raises(Crash):
    run(tmp_path / 'b', CrashingCheckpoints)
  resumed, said = run(tmp_path / 'b')
  assert said == ['resuming from step 4 of 8']
  assert differing(resumed.replace(frozen=None), straight.replace(frozen=None)) == []
  assert resumed.step == 8 and differing(resumed.params, stage.init().params)
  assert [step for step, _ in run_losses(tmp_path / 'a')] == list(range(1, 9))
  assert run_losses(tmp_path / 'a') == run_losses(tmp_path / 'b')


@pytest.mark.slow
def test_run_goes_on_with_other_devices(tmp_path, monkeypatch):
  """Saved on 8 devices that share everything, it goes on with 2, 1 or 4 of them as with all."""
  all_devices, sources = jax.devices(), [open_source('digits', split=split) for split in ('train', 'validation')]
  stage = Trainer('generator', **CERTAIN).stage

  def run(workdir, devices, sizes, kind=Checkpoints):
    monkeypatch.setattr(jax, 'devices', lambda *_: devices)
    config = tiny_config('generator', **CERTAIN, **{f'mesh.{name}': size for name, size in sizes.items()})
    with kind(workdir) as checkpoints:
      state = loop.train(stage, config, *sources, checkpoints, workdir, say=lambda _: None)
      return jax.device_get(state.replace(frozen=None, key=None))

  straight = run(tmp_path / 'straight', all_devices, dict(data=2, fsdp=2, tensor=2))
  with pytest.raises(Crash):
    run(tmp_path / 'crashed', all_devices, dict(data=2, fsdp=2, tensor=2), CrashingCheckpoints)
  for count, sizes in ((2, dict(data=1, tensor=2)), (1, {}), (4, dict(data=1, fsdp=4))):
    shutil.copytree(tmp_path / 'crashed', tmp_path / str(count))
    resumed = run(tmp_path / str(count), all_devices[:count], sizes)
    np.testing.assert_allclose([loss for _, loss in run_losses(tmp_path / str(count))],
                               [loss for _, loss in run_losses(tmp_path / 'straight')], rtol=1e-5)
    assert resumed.step == 8 and farthest(moments(resumed, 'mu'), moments(straight, 'mu')) < 1e-4


def test_finished_run_is_left_as_it_is(tmp_path):
  first, _ = train_line(Line(6), tmp_path)
  lines = metrics_of(tmp_path)
  second, said = train_line(Line(6), tmp_path)
  assert said == ['resuming from step 6 of 6'] and differing(first, second) == []
  assert metrics_of(tmp_path) == lines


def test_metrics_of_a_lost_stretch_are_dropped(tmp_path):
  with pytest.raises(Crash):
    train_line(Line(6), tmp_path, CrashingCheckpoints(tmp_path))
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "train/loss": 99.0}\n{"step": 6, "tra')  # and a line cut short
  train_line(Line(6), tmp_path)
  assert [step for step, _ in run_losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert all(loss != 99 for _, loss in run_losses(tmp_path))


def test_numbers_of_a_run_whose_checkpoints_are_gone_are_kept(tmp_path):
  train_line(Line(6), tmp_path)
  lines = metrics_of(tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints')
  _, said = train_line(Line(2), tmp_path)
  assert 'beginning at step 0' in said[0]
  assert [json.loads(line) for line in (tmp_path / 'metrics_before.jsonl').read_text().splitlines()] == lines
  assert [step for step, _ in run_losses(tmp_path)] == [1, 2]
  shutil.rmtree(tmp_path / 'checkpoints')
  train_line(Line(2), tmp_path)
  assert len((tmp_path / 'metrics_before.jsonl').read_text().splitlines()) > len(lines)  # kept again


def test_workdir_alone_resumes_and_says_what_changes(tmp_path_factory, tmp_path, capfd, monkeypatch):
  """On fewer devices, by slices; a longer run jumps to another place of the learning rate's schedule."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: first)
  workdir = shutil.copytree(train_both(tmp_path_factory)[2], tmp_path / 'w')
  config = workdir_lib.read_config(workdir)
  capfd.readouterr()
  assert main(['train', f'--workdir={workdir}', '--config.steps=6', '--config.accumulate=2']) == 0
  said = capfd.readouterr().err.splitlines()
  assert any(line.startswith('accumulate is now 2, it was 1') for line in said), said
  old, new = (float(rate_of(config.optimizer, steps)(4)) for steps in (4, 6))
  assert ('the run is now 6 steps long, it was 4: all that is a share of it moves, so at step 4 the learning rate goes '
          f'from {old:.3g} to {new:.3g}') in said and old < new
  assert 'resuming from step 4 of 6' in said and f'trained to step 6: {workdir}' in said
  assert workdir_lib.read_config(workdir).accumulate == 2
  assert main(['train', f'--workdir={workdir}', '--config.seed=1']) == 2
  assert 'accumulate' in capfd.readouterr().err  # what may change is listed


def test_stored_settings_come_back_as_they_were(tmp_path):
  """Of the kind that they had, also scales that are pairs."""
  config = tiny_config('tokenizer', **{'model.scales': ((1, 1), (1, 2), (2, 4)), 'image_size': (4, 8)})
  workdir_lib.write_config(tmp_path, config)
  assert workdir_lib.read_config(tmp_path).to_dict() == config.to_dict()
  assert workdir_lib.check_config(tmp_path, config) == []


EVERY_TWO = dict(eval_every=2, pictures_every=2, checkpoint_every=2)


def test_loop_saves_then_evaluates_then_takes_the_next_batch(tmp_path, monkeypatch):
  done, stage = [], Line(4)

  class Recording(Checkpoints):
    def finish(self):
      super().finish()
      done.append('saved')

  def recorded(name, function):
    return lambda *arguments, **options: done.append(name) or function(*arguments, **options)

  batches = loop.pipeline.train_batches
  class Batches:
    def __init__(self, *arguments, **options):
      self._batches = batches(*arguments, **options)

    def __next__(self):
      done.append('batch')
      return next(self._batches)

    def __getattr__(self, name):
      return getattr(self._batches, name)

  monkeypatch.setattr(loop.pipeline, 'train_batches', Batches)
  stage.summarize, stage.pictures = recorded('evaluated', stage.summarize), recorded('drawn', stage.pictures)
  train_line(stage, tmp_path, Recording(tmp_path), **EVERY_TWO)
  in_order = [name for i, name in enumerate(done) if done[i - 1:i] != [name] or name == 'batch']
  assert in_order == ['batch', 'batch', 'saved', 'evaluated', 'drawn', 'batch', 'batch', 'saved', 'evaluated', 'drawn']


def crash_once(function):
  left = [Crash()]

  def crash(*arguments):
    if left:
      raise left.pop()
    return function(*arguments)

  return crash


@pytest.mark.parametrize('checkpoint_every', [2, 4])
@pytest.mark.parametrize('part', ['summarize', 'pictures', 'measure', 'keep'])
def test_crash_in_an_evaluation_costs_no_step_and_no_part_of_it(part, checkpoint_every, tmp_path):
  changes = EVERY_TWO | dict(checkpoint_every=checkpoint_every, best='samples/a')
  config = tiny_config('generator', **changes, **{'measure.every': 2})
  values = {'a': 3.0, 'b': 2.0}

  def run(workdir, crashes=None):
    stage, said, kept = Line(4), [], []
    parts = {'summarize': stage.summarize, 'pictures': stage.pictures, 'measure': lambda state: values,
             'keep': lambda params, step: kept.append(step)}
    if crashes:
      parts[crashes] = crash_once(parts[crashes])
    stage.summarize, stage.pictures = parts['summarize'], parts['pictures']
    with Checkpoints(workdir) as checkpoints:
      state = loop.train(stage, config, numbers(), numbers(20), checkpoints, workdir, say=said.append,
                         measure=parts['measure'], keep=parts['keep'])
      return jax.device_get(state), said, kept

  straight, *_ = run(tmp_path / 'straight')
  with pytest.raises(Crash):
    run(tmp_path / 'crashed', part)
  assert not (tmp_path / 'crashed/pictures/first_0000004.png').exists()
  resumed, said, kept = run(tmp_path / 'crashed')
  assert said == ['resuming from step 2 of 4'] and kept == [2] and differing(resumed, straight) == []
  lines = [[{name: value for name, value in line.items() if 'per_second' not in name} for line in metrics_of(workdir)]
           for workdir in (tmp_path / 'straight', tmp_path / 'crashed')]
  assert lines[0] == lines[1] and len(lines[0]) == 4 + 2 + 2
  for name in ('straight', 'crashed'):
    pictures = sorted(path.name for path in (tmp_path / name / 'pictures').iterdir())
    assert pictures == ['first_0000002.png', 'first_0000004.png']


def test_best_model_is_kept_in_place_of_all_others(tmp_path):
  """Also of a later one, of a stretch that a kill has undone; but not once more where it is there."""
  config = tiny_config('tokenizer')
  for value, step in ((8.0, 8), (6.0, 6), (5.0, 6)):
    lineage.keep_best(tmp_path, config, {}, {'w': jax.numpy.full((), value)}, step)
    with Checkpoints(tmp_path / 'best') as checkpoints:
      assert checkpoints.steps() == [step]
      params, *_ = checkpoints.restore_model({'w': jax.numpy.zeros(())}, one_device())
      assert params['w'] == max(value, step)


KILLED = '''
import sys
sys.path.insert(0, 'tests')
from tiny_runs import Line, Checkpoints, loop, numbers, tiny_config

config = tiny_config('generator', eval_every=3, pictures_every=5, checkpoint_every=4, **{'measure.every': 6})
measure = lambda state: {'a': state.step}
with Checkpoints(sys.argv[1]) as checkpoints:
  loop.train(Line(60), config, numbers(), numbers(20), checkpoints, sys.argv[1], measure=measure)
'''


@pytest.mark.slow
def test_kills_within_evaluations_leave_no_trace(tmp_path):
  """Nor does a line of the metrics come twice, or a picture be missing."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT)}

  def start(workdir):
    return subprocess.Popen([sys.executable, '-c', KILLED, workdir], cwd=ROOT, env=environment, stderr=subprocess.PIPE)

  assert start(tmp_path / 'straight').wait(timeout=120) == 0
  draw, killed, stopped = random.Random(0), tmp_path / 'killed', set()
  for kill in range(15):
    process, wanted = start(killed), 4 * kill + draw.randint(1, 4)
    path, until = killed / 'metrics.jsonl', time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None and (
        not path.exists() or f'"step": {wanted}' not in path.read_text()):
      pass
    time.sleep(draw.uniform(0, 0.05))
    process.kill()
    process.wait()
    stopped.add(tuple(saved_steps(killed)))
  assert start(killed).wait(timeout=120) == 0
  without_rates = lambda workdir: [{name: value for name, value in line.items() if 'per_second' not in name}
                                   for line in metrics_of(workdir)]
  assert len(stopped) > 5 and without_rates(killed) == without_rates(tmp_path / 'straight')
  names = [sorted(path.name for path in (w / 'pictures').glob('[!.]*')) for w in (killed, tmp_path / 'straight')]
  assert names[0] == names[1] and len(names[0]) == 12


def test_later_of_two_runs_goes_on_where_nothing_locks(tmp_path, monkeypatch):
  """As on two machines that share a disk: nothing of the earlier one is written any more."""
  def no_locks(*arguments):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(lock.fcntl, 'flock', no_locks)
  with lock.alone(tmp_path) as first, lock.alone(tmp_path) as second:
    train_line(Line(2), tmp_path, Checkpoints(tmp_path, guard=second))
    before = (tmp_path / 'metrics.jsonl').read_text()
    with pytest.raises(UserError, match='another run has begun in'):
      train_line(Line(4), tmp_path, Checkpoints(tmp_path, guard=first))
    assert (tmp_path / 'metrics.jsonl').read_text() == before and saved_steps(tmp_path) == [2]
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match='is gone'):
      second()


def test_signal_is_heeded_between_the_batches_of_an_evaluation(tmp_path, monkeypatch):
  whole = evaluation.pipeline.eval_batches

  def interrupted(*arguments, **options):
    with contextlib.closing(whole(*arguments, **options)) as batches:
      yield next(batches)
      os.kill(os.getpid(), signal.SIGTERM)
      yield next(batches)
      pytest.fail('a third batch was taken')

  monkeypatch.setattr(evaluation.pipeline, 'eval_batches', interrupted)
  with pytest.raises(loop.Interrupted, match='step 2 and saved'):
    train_line(Line(4), tmp_path, eval_every=2, checkpoint_every=4)
  assert not [line for line in metrics_of(tmp_path) if 'validation/w' in line]
  monkeypatch.undo()
  _, said = train_line(Line(4), tmp_path, eval_every=2, checkpoint_every=4)
  assert said == ['resuming from step 2 of 4']
  assert [line['step'] for line in metrics_of(tmp_path) if 'validation/w' in line] == [2, 4]


def test_speed_leaves_the_compiler_and_evaluations_out(tmp_path):
  class Slow(Line):
    def train_step(self, state, batch, phase=None):
      time.sleep(1)  # while it is traced
      return super().train_step(state, batch, phase)

    def pictures(self, state, batch):
      time.sleep(1)
      return super().pictures(state, batch)

  train_line(Slow(8), tmp_path, log_every=4, pictures_every=2)
  rates = [line['train/steps_per_second'] for line in metrics_of(tmp_path)]
  assert len(rates) == 2 and min(rates) > 4, rates


def three_steps():
  bar = progress.bar(title='line', unit='step', total=3, delay=0)
  with bar.doing('compiling', 0):
    time.sleep(0.5)
  assert bar.format_dict['elapsed'] < 0.4  # or the time left would be far too long
  for _ in progress.bar(range(2), title='quick', unit='batch'):
    bar.update()
  bar.close()


def test_log_file_gets_whole_lines_and_few(capfd):
  three_steps()
  first, second, last = capfd.readouterr().err.splitlines(keepends=True)
  assert first.startswith('line: 0/3 [') and second == 'line: compiling\n' and last.startswith('line: 2/3 [')
  assert (first + second + last).replace('\n', '').isprintable()


def test_terminal_gets_a_bar_that_says_what_is_done(monkeypatch):
  terminal, other = os.openpty()
  fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))  # rows and columns
  with open(other, 'w') as stream:
    monkeypatch.setattr(sys, 'stderr', stream)
    three_steps()
    text = ''
    while '\n' not in text and select.select([terminal], [], [], 10)[0]:  # it comes in pieces
      text += os.read(terminal, 10_000).decode()
  os.close(terminal)
  assert text.count('\n') == 1 and '\rline:   0%' in text and 'compiling]' in text and 'quick' not in text


@contextlib.contextmanager
def small_files(size):
  """Within, no file of this process can grow beyond so many bytes: as a disk that is full by then."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_metrics_are_rewritten_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  text = ''.join(f'{{"step": {step}, "train/loss": 1.0}}\n' for step in range(1, 5))
  path.write_text(text)
  with small_files(50), pytest.raises(OSError):
    metrics.Writer(tmp_path, 3)
  assert path.read_text() == text
  (tmp_path / 'metrics_before.jsonl').write_text('{"step": 9}\n')
  with small_files(50), pytest.raises(OSError):
    metrics.set_aside(tmp_path)
  assert path.read_text() == text and (tmp_path / 'metrics_before.jsonl').read_text() == '{"step": 9}\n'
  assert metrics.set_aside(tmp_path) and not path.exists()
  assert (tmp_path / 'metrics_before.jsonl').read_text() == '{"step": 9}\n' + text
  path.write_text(text)  # as when a kill came before this file was gone
  assert metrics.set_aside(tmp_path) and (tmp_path / 'metrics_before.jsonl').read_text() == '{"step": 9}\n' + text


@pytest.fixture
def start(experiment):
  """Starts `python -m var_jax train` on a tokenizer in a process of its own, with one device."""
  processes = []

  def start(workdir):
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    processes.append(subprocess.Popen(
        [sys.executable, '-m', 'var_jax', 'train', f'--config={experiment}:tokenizer', f'--workdir={workdir}',
         f'--config.steps={STEPS}', '--config.checkpoint_every=10', *(f'--config.{k}={v}' for k, v in FULL.items())],
        stderr=subprocess.PIPE, text=True, env=environment))
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()


def saved_steps(workdir):
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def stop_after_save(process, workdir, number):
  """(exit status, stderr) of a process that gets a signal once it has saved another step."""
  before, until = saved_steps(workdir), time.monotonic() + 120
  while saved_steps(workdir)[-1:] == before[-1:] and process.poll() is None and time.monotonic() < until:
    time.sleep(0.005)
  process.send_signal(number)
  errors = process.communicate(timeout=60)[1]
  return process.returncode, errors


def state_of(workdir):
  """The final state in a workdir."""
  stage = _stage('tokenizer', tuple(FULL.items()))
  with Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(
        mesh_lib.placed(jax.eval_shape(stage.init), mesh_lib.make_mesh(jax.devices()[:1])))[0]


@pytest.mark.slow
def test_killed_run_equals_straight_run(start, tmp_path):
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  errors = start(straight).communicate(timeout=180)[1]
  assert saved_steps(straight)[-1] == STEPS, errors
  status, errors = stop_after_save(start(killed), killed, signal.SIGKILL)
  assert status == -signal.SIGKILL and saved_steps(killed), errors
  for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    before = saved_steps(killed)[-1]
    status, errors = stop_after_save(start(killed), killed, number)
    assert status == expected, errors
    stopped = int(re.search(r'stopped at step (\d+) and saved; the same command goes on from there', errors)[1])
    assert before < stopped < STEPS and saved_steps(killed)[-1] == stopped and 'Traceback' not in errors
  errors = start(killed).communicate(timeout=180)[1]
  assert f'resuming from step {stopped} of {STEPS}' in errors and f'trained to step {STEPS}: {killed}' in errors
  assert run_losses(killed) == run_losses(straight) and len(run_losses(straight)) == STEPS
  assert differing(state_of(killed), state_of(straight)) == []


def test_second_interrupt_stops_at_once(tmp_path):
  before = signal.getsignal(signal.SIGINT)  # shells start background jobs with it ignored
  stage = Line(1000)

  def interrupt(state, batch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return {}

  stage.pictures = interrupt
  with pytest.raises(KeyboardInterrupt):
    train_line(stage, tmp_path, pictures_every=2)
  assert signal.getsignal(signal.SIGINT) is before
