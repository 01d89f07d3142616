"""Several processes as one program: how they join, which of them writes files, and what one says to all."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

from var_jax import signals
from var_jax.errors import UserError

LOST = 75  # exit status when another process is missing: "try again", as in sysexits.h; nothing is wrong with the input


def join(how, timeout=300):
  """Joins the other processes of a run. Before anything else touches a device.

  how: 'auto' where a TPU pod, Slurm, Open MPI or Kubernetes tells who they are; else 'HOST:PORT,COUNT,INDEX', the first
  process's address, how many there are and which this is. timeout: seconds to wait for them. UserError when they do
  not all come.
  """
  given = {}
  if how != 'auto':
    try:
      address, count, index = how.split(',')
      host, _, port = address.rpartition(':')
      given = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
      if not host or not 0 < int(port) < 2**16:  # jax would wait for it, or abort
        raise ValueError(f'no host and port in {address}')
    except ValueError as error:
      raise _nobody(how, 'that is no address, count and index') from error
    if given['process_id'] == 0:
      _check_port(int(port))
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_cpu_enable_async_dispatch', False)  # nor does gloo tell programs apart that overlap
  # jax would abort the process with pages of its own when the time is over.
  watch = threading.Timer(timeout, leave, [
      f'the processes did not all join within {timeout} seconds: look at those that are missing, and start all again'])
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(**given, initialization_timeout=timeout + 60)
  except (RuntimeError, ValueError) as error:
    raise _nobody(how, ' '.join(str(error).split())[:200]) from error
  finally:
    watch.cancel()
  if jax.default_backend() == 'cpu':
    # A cached program and one that was compiled number their collectives differently: gloo then mixes them up.
    jax.config.update('jax_enable_compilation_cache', False)


def _check_port(port):
  """Raises UserError when the first process could not listen there, for which jax crashes."""
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise UserError(f'port {port} cannot be had ({error.strerror}): choose another for --distributed, or stop what has '
                    'it, such as another process of INDEX 0') from None


def _nobody(how, why):
  return UserError(f'--distributed={how}: this process cannot find the others ({why}): write '
                   '--distributed=HOST:PORT,COUNT,INDEX')


class Apart(Exception):
  """The processes do not see the same files: no fault of the input, and another start may see them."""


@contextlib.contextmanager
def together():
  """Within, an error of one of several processes ends it at once: jax would first wait for the others, for minutes."""
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    line = ' '.join(str(error).split())[:300]
    if isinstance(error, UserError):
      leave(line, 2)
    if isinstance(error, Apart):
      leave(line)
    if is_loss(error):
      leave('another process died, or the network between them: start all again, they go on from what is saved '
            f'({line})')
    traceback.print_exc()
    os._exit(1)


@contextlib.contextmanager
def stop_requests():
  """A list that receives the number of each of `signals.NUMBERS` that comes; a second Ctrl-C stops at once."""
  received = []

  def note(number, frame):
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)

  with signals.waiting():
    previous = {number: signal.signal(number, note) for number in signals.heard()}
    try:
      yield received
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


def asked(received):
  """The number of a signal that any of the processes received, 0 for none: the same on all, which all have to ask."""
  return max(from_all(received[0] if received else 0))


def is_loss(error):
  """Whether an error says that another process, or the network between them, is gone."""
  while error is not None and jax.process_count() > 1:
    # orbax waits for the others at barriers, and hands on what becomes of that as a TimeoutError, or its text alone.
    words = 'Gloo' in str(error) or 'barrier' in str(error).lower()
    if words or isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)):
      return True
    error = error.__cause__ or error.__context__
  return False


def leave(message, status=LOST):
  """Ends this process at once."""
  print(f'error: {message}', file=sys.stderr, flush=True)
  os._exit(status)


def is_first():
  """Whether this process writes what one alone has to write."""
  return jax.process_index() == 0


def wait(name):
  """Until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def preempted(step):
  """Whether the machines are to be taken away, as told to jax by another way than SIGTERM: the same on all processes.

  Each of several processes asks at every step.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def from_first(value):
  """The first process's value, one that JSON can hold, on all."""
  return from_all(value)[0]


def from_all(value):
  """[each process's value], of those that JSON can hold; the same list on all."""
  if jax.process_count() == 1:
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = np.ravel(multihost_utils.process_allgather(np.array([len(content)], np.int32)))
  padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # few lengths: each is a program of its own
  padded[:len(content)] = content
  rows = np.reshape(multihost_utils.process_allgather(padded), (len(lengths), -1))
  return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths)]
