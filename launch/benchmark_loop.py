"""How long a training run's device waits for anything but its step: rows of benchmark.py, which calls this."""

import statistics
import tempfile
import time

import jax

from var_jax.data import pipeline
from var_jax.data.sources import open_source
from var_jax.training import loop, metrics
from var_jax.training import mesh as mesh_lib
from var_jax.training.checkpoint import Checkpoints

STEPS = 40  # of a stretch that is timed


def rates(stage_of, config, repeats, steps=STEPS):
  """{name: number}: images/s of the training loop on the digits, and the share of its time beyond that of its step.

  stage_of: (config, number of steps) -> a stage, whose arrays may be used up. The step alone is timed before and after,
  on one batch that is there; of all stretches the medians count. Nothing is evaluated or saved meanwhile.
  """
  config = config.copy_and_resolve_references().unlock()
  config.update(log_every=steps, eval_every=0, pictures_every=0, checkpoint_every=0)
  stage, source = lambda: stage_of(config, (repeats + 1) * steps), open_source('digits')
  alone = seconds_alone(stage(), config, source, repeats, steps)
  with tempfile.TemporaryDirectory() as folder:
    with Checkpoints(folder, say=lambda text: None) as checkpoints:
      loop.train(stage(), config, source, source, checkpoints, folder, say=lambda text: None)
    series = metrics.read(checkpoints.folder.parent / 'metrics.jsonl')['train/steps_per_second']
  taken = [1 / rate for _, rate in series[1:]]  # the first one has the compiler's time
  alone += seconds_alone(stage(), config, source, repeats, steps)
  whole, step = statistics.median(taken), statistics.median(alone)
  return {'seconds': whole, 'images_per_second': config.batch_size / whole, 'step_seconds': step,
          'share_beyond_step': 1 - step / whole}


def seconds_alone(stage, config, source, repeats, steps):
  """Seconds of a step in each of some stretches, without the loop."""
  mesh, found = mesh_lib.make_mesh(**config.mesh), []
  with jax.set_mesh(mesh):
    batches = pipeline.train_batches(source, batch_size=config.batch_size, size=stage.image_size, seed=0)
    batch = mesh_lib.put_batch(next(batches), mesh)
    batches.close()
    state = mesh_lib.put_state(jax.jit(stage.init)().replace(frozen=stage.frozen), mesh)
    step, stop = loop.jitted_step(stage, state, mesh), mesh_lib.put_number(0, mesh)
    for _ in range(repeats + 1):
      start = time.monotonic()
      for _ in range(steps):
        state, out = step(state, batch, stop)
      jax.block_until_ready((state, out))
      found.append((time.monotonic() - start) / steps)
  return found[1:]
