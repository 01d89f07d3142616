"""Signals: a run saves and ends, all other commands end at once, in one line and with 128 + the signal's number."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import ROOT, Line, numbers, train_line

from var_jax.data import pipeline
from var_jax.training import loop
from var_jax.training.checkpoint import Checkpoints

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def not_under_nohup():
  """The tests may be: what they start would inherit that SIGHUP is ignored."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


def interrupting(number):
  """A stage that gets a signal while it draws the pictures of step 2."""
  stage = Line(4)
  draw = stage.pictures

  def pictures(state, batch):
    if state.step == 2:
      os.kill(os.getpid(), number)
    return draw(state, batch)

  stage.pictures = pictures
  return stage


@pytest.mark.parametrize('number', ALL, ids=lambda number: number.name)
def test_every_signal_that_asks_to_stop_saves_the_run(number, tmp_path):
  before = signal.getsignal(number)
  with pytest.raises(loop.Interrupted, match='stopped at step 2 and saved') as stop:
    train_line(interrupting(number), tmp_path, pictures_every=2)
  assert stop.value.signal_number == number and signal.getsignal(number) is before
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2]


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_that_is_ignored_stays_so(number, tmp_path):
  """As SIGHUP under nohup."""
  before = signal.signal(number, signal.SIG_IGN)
  try:
    state, _ = train_line(interrupting(number), tmp_path, pictures_every=2)
    assert state.step == 4 and signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, before)


def test_processes_that_read_images_leave_signals_to_the_run():
  """Slurm sends them to all of a job's processes: the run needs batches until it has saved."""
  batches = pipeline.train_batches(numbers(), batch_size=8, size=(8, 8), seed=0, workers=1)
  try:
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
      for number in ALL:
        os.kill(worker.pid, number)
    for _ in range(8):
      next(batches)
    assert workers and all(worker.is_alive() for worker in workers)
  finally:
    batches.close()


# What compiles is here a call of C that never returns, meanwhile Python runs no handlers: a lock taken twice.
FOR_EVER = '''
import ctypes

def wait():
  lock = ctypes.create_string_buffer(64)
  print('now', flush=True)
  ctypes.CDLL(None).pthread_mutex_lock(lock)
  ctypes.CDLL(None).pthread_mutex_lock(lock)
'''
COMPILING = FOR_EVER + '''
import sys
sys.path.insert(0, 'tests')
from var_jax.commands import script
from tiny_runs import Line, train_line

class Slow(Line):
  def train_step(self, state, batch, phase=None):
    wait()

script.run(lambda arguments: train_line(Slow(4), arguments[0]) and 0)
'''
ENDING = FOR_EVER + '''
from var_jax.commands import script

script.run(lambda arguments: wait())
'''


def ended_by(number, program, *arguments):
  """(exit status, stderr, seconds) of a program that gets a signal once it has said so."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen([sys.executable, '-c', program, *arguments], cwd=ROOT, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  try:
    assert process.stdout.readline() == 'now\n', process.stderr.read()
    begun = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors, time.monotonic() - begun
  finally:
    process.kill()


def test_signal_ends_a_run_whose_first_step_compiles_at_once(tmp_path):
  status, errors, seconds = ended_by(signal.SIGUSR1, COMPILING, str(tmp_path))
  assert status == 128 + signal.SIGUSR1 and seconds < 20
  assert errors.splitlines()[-1] == 'stopped before the first step (SIGUSR1)' and 'compiling' in errors


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signal_ends_a_command_in_one_line(number):
  status, errors, seconds = ended_by(number, ENDING)
  assert status == 128 + number and seconds < 20
  assert errors == ('stopped\n' if number == signal.SIGINT else f'stopped ({number.name})\n')
