"""A small classifier, trained on real images in a minute, that judges whether samples show the class asked for.

    judge = train_judge(images_NxHxWx3, labels_N, num_classes=10)
    judge.accuracy(real_test_images, test_labels)        # what the judge itself is worth
    judge.accuracy(samples, labels_asked_for)            # how often a sample is taken for its class

It is a yardstick for small data sets, no part of any model, and never sees a generated image in training.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from var_jax import progress as progress_lib
from var_jax.errors import UserError

MIN_STEPS = 300  # a thousand images need many passes ...
MIN_EPOCHS = 6  # ... sixty thousand a few


class Classifier(nn.Module):
  """Three strided convolutions, a hidden layer: (B, H, W, 3) in [-1, 1] -> logits (B, classes), hidden (B, D)."""
  num_classes: int
  widths: tuple = (32, 64, 128)
  hidden: int = 128
  dropout: float = 0.3

  @nn.compact
  def __call__(self, x_BxHxWx3, *, train=False):
    x = x_BxHxWx3
    for width in self.widths:
      x = nn.relu(nn.Dense(width)(_patches(x)))
    hidden_BxD = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(nn.Dropout(self.dropout, deterministic=not train)(hidden_BxD)), hidden_BxD


def _patches(x_BxHxWxC):
  """The 3x3 neighbourhoods of every other pixel, (B, H/2, W/2, 9*C): a dense layer on them is a strided convolution.

  On a CPU XLA differentiates this twice as fast as a convolution with strides.
  """
  _, height, width, _ = x_BxHxWxC.shape
  x = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate([x[:, i:i + height:2, j:j + width:2] for i in range(3) for j in range(3)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Judge:
  """A trained classifier for images of one size; `params` are plain arrays."""
  model: Classifier
  params: dict
  image_shape: tuple
  forward: Callable  # jitted: (params, uint8 images of a full batch) -> logits, hidden
  batch_size: int

  def predict(self, images_NxHxWx3):
    """Labels (N,) int32 of uint8 images."""
    return self._run(images_NxHxWx3)[0].argmax(-1).astype(np.int32)

  def accuracy(self, images_NxHxWx3, labels_N):
    """Share in [0, 1] of the images that are taken for their label."""
    return float(np.mean(self.predict(images_NxHxWx3) == np.asarray(labels_N)))

  def features(self, images_NxHxWx3):
    """The hidden layer, (N, D) float32 >= 0, to compare sets of images by their Fréchet distance."""
    return self._run(images_NxHxWx3)[1]

  def _run(self, images_NxHxWx3):
    images = _checked(images_NxHxWx3, self.image_shape)
    batches = []
    for start in range(0, len(images), self.batch_size):
      batch = images[start:start + self.batch_size]
      full = np.zeros((self.batch_size, *self.image_shape), np.uint8)  # one shape, one compilation
      full[:len(batch)] = batch
      batches.append([np.asarray(a)[:len(batch)] for a in self.forward(self.params, full)])
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def train_judge(images_NxHxWx3, labels_N, num_classes, *, seed=0, epochs=None, batch_size=128, learning_rate=3e-3,
                shift=1, progress=False):
  """A Judge, trained on uint8 images with labels 0..num_classes-1. The same seed gives the same judge.

  epochs: None for enough of them, by the number of images. shift: augmentation, up to so many pixels either way.
  Raises UserError for images or labels that do not fit together.
  """
  images_NxHxWx3, labels_N = _checked(images_NxHxWx3), np.asarray(labels_N, np.int32)
  if labels_N.shape != images_NxHxWx3.shape[:1]:
    raise UserError(f'the judge got {len(images_NxHxWx3)} images and labels of shape {labels_N.shape}: give one each')
  if labels_N.min() < 0 or labels_N.max() >= num_classes:
    raise UserError(f'labels run from {labels_N.min()} to {labels_N.max()}, the judge knows 0..{num_classes - 1}: '
                    'set num_classes to the number of classes')
  batch_size = min(batch_size, len(images_NxHxWx3))
  steps_per_epoch = len(images_NxHxWx3) // batch_size
  epochs = epochs or max(MIN_EPOCHS, -(-MIN_STEPS // steps_per_epoch))
  model = Classifier(num_classes)
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  params = model.init(init_key, jnp.zeros((1, *images_NxHxWx3.shape[1:])))['params']
  schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps_per_epoch)
  optimizer = optax.adamw(schedule, weight_decay=1e-3)
  train_step = _train_step(model, optimizer, dropout_key)
  opt_state = optimizer.init(params)
  batches = _batches(images_NxHxWx3, labels_N, batch_size, epochs, shift, np.random.default_rng(seed))
  bar = progress_lib.bar(batches, title='judge', unit='step', total=epochs * steps_per_epoch, show=progress)
  for step, batch in enumerate(bar):
    params, opt_state = train_step(params, opt_state, step, *batch)
  return _judge(model, params, images_NxHxWx3.shape[1:], batch_size)


def _judge(model, params, image_shape, batch_size):
  forward = jax.jit(lambda params, images: model.apply({'params': params}, _scaled(images)))
  return Judge(model, params, image_shape, forward, batch_size)


def save_judge(path, name, judge):
  """Writes a judge to an .npz. name: of the images that it was trained on."""
  np.savez(path, name=name, batch_size=judge.batch_size, **flatten_dict(judge.params, sep='/'))


def export_judge(path, judge):
  """Writes a judge as a jax.export artifact: uint8 images (b, H, W, 3) -> logits (b, classes), any batch size."""
  (b,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((b, *judge.image_shape), jnp.uint8)
  logits = jax.jit(lambda x: judge.forward(judge.params, x)[0])
  artifact = export.export(logits, platforms=('cpu', 'cuda', 'tpu'))(images)
  pathlib.Path(path).write_bytes(artifact.serialize())


def load_judge(path, name, image_shape, num_classes):
  """The judge in an .npz that `save_judge` wrote under this name, None when there is none."""
  try:
    with np.load(path) as arrays:
      found = {key: arrays[key] for key in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return None
  if found.pop('name', None) != name:
    return None
  batch_size = int(found.pop('batch_size'))
  return _judge(Classifier(num_classes), unflatten_dict(found, sep='/'), image_shape, batch_size)


def _train_step(model, optimizer, dropout_key):
  """A jitted step: (params, opt_state, step number, uint8 images, labels) -> params, opt_state."""

  def loss(params, step, images_BxHxWx3, labels_B):
    rngs = {'dropout': jax.random.fold_in(dropout_key, step)}
    logits_BxC, _ = model.apply({'params': params}, _scaled(images_BxHxWx3), train=True, rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()

  @jax.jit
  def train_step(params, opt_state, step, images_BxHxWx3, labels_B):
    updates, opt_state = optimizer.update(jax.grad(loss)(params, step, images_BxHxWx3, labels_B), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return train_step


def _batches(images_NxHxWx3, labels_N, batch_size, epochs, shift, rng):
  """Yields shuffled batches of uint8 images, each image shifted at random, for some epochs; drops what is left over."""
  count, height, width, _ = images_NxHxWx3.shape
  padded = np.pad(images_NxHxWx3, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode='edge')
  for _ in range(epochs):
    order = rng.permutation(count)
    for start in range(0, count - batch_size + 1, batch_size):
      chosen = order[start:start + batch_size]
      top, left = rng.integers(0, 2 * shift + 1, (2, batch_size, 1))
      rows, columns = top + np.arange(height), left + np.arange(width)
      yield padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], labels_N[chosen]


def _scaled(images_uint8):
  return images_uint8.astype(jnp.float32) / 127.5 - 1


def _checked(images, shape=None):
  """The images as an array, if they are (N, H, W, 3) uint8 and of the given (H, W, 3); UserError otherwise."""
  images = np.asarray(images)
  wanted = shape or (*images.shape[1:3], 3)
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted or not len(images):
    raise UserError(f'the judge got images of shape {images.shape} and type {images.dtype}: give uint8 images '
                    f'(N, {", ".join(map(str, wanted)) if shape else "H, W, 3"})')
  return images
