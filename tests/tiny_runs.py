"""The smallest runs of both stages and of a stage of one number, shared by the tests of training and commands."""

import contextlib
import functools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax

from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.data.arrays import ArraySource
from var_jax.stages.generator import GeneratorStage
from var_jax.stages.tokenizer import TokenizerStage
from var_jax.training import loop
from var_jax.training import mesh as mesh_lib
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).parents[1]

EXPERIMENT = '''"""Both stages on 8 px digits, as small as they get, for the tests."""

from var_jax import configs


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, depth=2, runlocal=False)
  config = configs.tokenizer() if stage == 'tokenizer' else configs.generator(options['depth'])
  config.update(batch_size=8, steps=8, ema=0.9, log_every=1, eval_every=0, pictures_every=0, checkpoint_every=4)
  config.eval_images = 20
  config.optimizer.update(peak_lr=1e-3, warmup=0.0)
  if stage == 'tokenizer':
    config.image_size = (8, 8)
    config.model.update(scales=(1, 2, 4), codes=32, channels=8, ch=8, ch_mult=(1, 2), res_blocks=1)
    config.loss.discriminator_ch = 8
  else:
    config.model.update(width=32, heads=2, classes=10)
    config.sample.update(top_k=0, top_p=0.9)
  return config
'''

# Everything that a tokenizer's training can turn on, and in eight steps.
FULL = {'loss.adversarial': 0.5, 'loss.adversarial_start': 0.5, 'codebook.restart_every': 1,
        'codebook.restart_after': 2, 'codebook.scale_dropout': 0.5}
# A generator without randomness: labels always dropped, paths never.
CERTAIN = {'label_drop': 1.0, 'drop_path': 0.0}


@contextlib.contextmanager
def optimizations():
  """Within, programs are compiled as users' are; see conftest.py."""
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', True)


def write_experiment(folder):
  file = folder / 'tiny.py'
  file.write_text(EXPERIMENT)
  return file


def tiny_config(kind, **changes):
  """The experiment's config with changes such as **{'optimizer.peak_lr': 1}."""
  names = {}
  exec(EXPERIMENT, names)
  config = names['get_config'](kind)
  config.update_from_flattened_dict(changes)
  return config.lock()


@functools.cache
def _stage(kind, changes):
  config = tiny_config(kind, **dict(changes))
  if kind == 'tokenizer':
    return TokenizerStage(config, workdir_lib.make_tokenizer(config), config.steps)
  tokenizer, state = _stage('tokenizer', ()).tokenizer, _initial('tokenizer', ())
  params = jax.tree.map(jnp.asarray, state.params)
  return GeneratorStage(config, workdir_lib.make_generator(config, tokenizer), tokenizer, params, 'abc', config.steps)


@functools.cache
def _initial(kind, changes):
  stage = _stage(kind, changes)
  return jax.tree.map(np.asarray, jax.jit(stage.init)(stage.initial).replace(frozen=stage.frozen))


@functools.cache
def _compiled(kind, changes, sizes, method):
  mesh = mesh_lib.make_mesh(jax.devices()[:math.prod(sizes)], data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
  stage = _stage(kind, changes)
  function = jax.jit(getattr(stage, method), donate_argnums=0 if method == 'train_step' else ())

  def run(state, batch):
    with jax.set_mesh(mesh):
      return jax.device_get(function(mesh_lib.put_state(state, mesh), mesh_lib.put_batch(batch, mesh)))

  def lowered(state, batch):
    with jax.set_mesh(mesh):
      return function.lower(mesh_lib.put_state(state, mesh), mesh_lib.put_batch(batch, mesh))

  run.lowered = lowered
  return run


class Trainer:
  """A stage of the tiny experiment with its state before the first step, as NumPy arrays, and its compiled steps.

  mesh: sizes of data, fsdp and tensor.
  """

  def __init__(self, kind, mesh=(1, 1, 1), **changes):
    key = kind, tuple(sorted(changes.items()))
    self.stage, self.initial = _stage(*key), _initial(*key)
    self.step, self.evaluate = (_compiled(*key, mesh, name) for name in ('train_step', 'eval_step'))

  def run(self, steps, state=None):
    """[(state, metrics)] after each of some steps, each on a batch of its own."""
    state, out = self.initial if state is None else state, []
    for _ in range(steps):
      state, metrics = self.step(state, some_batch(int(state.step)))
      out.append((state, metrics))
    return out


def some_batch(seed=0, size=8):
  rng = np.random.default_rng(seed)
  image = rng.uniform(-1, 1, (8, size, size, 3)).astype(np.float32)
  return {'image': image, 'label': rng.integers(0, 10, 8).astype(np.int32), 'mask': np.ones(8, np.float32)}


def leaves(tree):
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def differing(a, b):
  """Names of the leaves that are not bit for bit the same."""
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  return [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]


def farthest(a, b):
  """The largest difference between two trees, relative to their largest value."""
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  return max(np.abs(a[n] - b[n]).max() for n in a) / max(np.abs(x).max() for x in b.values())


def moments(state, name):
  return optax.tree.get(state.opt_state, name)


class Line:
  """The smallest stage: one number drawn towards the images' mean. From step `breaks` on its gradients are NaN."""

  name, metadata, image_size, initial, frozen = 'line', {'line': 'a'}, (8, 8), None, None

  def __init__(self, steps, breaks=None, events=None):
    self.steps, self.breaks, self.events, self.optimizer = steps, breaks, events, optax.sgd(0.1)

  def init(self, initial=None):
    return TrainState.create(0, {'w': jnp.ones(())}, self.optimizer, ema=False)

  def check_metadata(self, metadata):
    assert metadata['line'] == 'a'

  def phase(self, step):
    return None

  def train_step(self, state, batch, phase=None):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p['w'] - batch['image']) ** 2))(state.params)
    if self.breaks is not None:
      grads = jax.tree.map(lambda g: jnp.where(state.step >= self.breaks, jnp.nan, g), grads)
    state, metrics = state.updated(grads, self.optimizer)
    return state, {'loss': loss} | metrics

  def eval_step(self, state, batch):
    return {'sum': jnp.sum(batch['mask'] * state.model['w']), 'images': batch['mask'].sum()}

  def summarize(self, sums):
    return {'w': sums['sum'] / sums['images']}

  def pictures(self, state, batch):
    return {'first': np.zeros((8, 8, 3), np.uint8)}


def numbers(count=32):
  pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
  return ArraySource(pixels, np.arange(count) % 10, tuple('0123456789'))


def train_line(stage, workdir, checkpoints=None, **changes):
  config = tiny_config('tokenizer', **changes)
  said = []
  with checkpoints or Checkpoints(workdir, config.keep) as checkpoints:
    state = loop.train(stage, config, numbers(), numbers(20), checkpoints, workdir, say=said.append)
  return jax.device_get(state), said


def metrics_of(workdir):
  return [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


def truncate(folder):
  for file in folder.rglob('*'):
    if file.is_file():
      with file.open('r+b') as opened:
        opened.truncate(file.stat().st_size // 2)


def one_device():
  return mesh_lib.replicated(mesh_lib.make_mesh(jax.devices()[:1]))


SHORT = ['--config.steps=4', '--config.eval_every=4', '--config.pictures_every=4']


_trained = []


def train_both(factory):
  """(experiment, tokenizer's workdir, generator's), trained once for all files of tests.

  The generator's was given a tokenizer's workdir that is gone since: it has to live on its copy.
  """
  if _trained:
    return _trained
  folder = factory.mktemp('trained')
  experiment, tokenizer, generator, lent = write_experiment(folder), *(folder / name for name in ('t', 'g', 'lent'))
  assert main(['train', f'--config={experiment}:tokenizer', f'--workdir={tokenizer}', *SHORT]) == 0
  shutil.copytree(tokenizer, lent)
  assert main(['train', f'--config={experiment}:generator', f'--workdir={generator}', f'--config.tokenizer={lent}',
               *SHORT]) == 0
  shutil.rmtree(lent)
  _trained.extend((experiment, tokenizer, generator))
  return _trained
