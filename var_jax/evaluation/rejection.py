"""Rejection sampling: of several candidates for an image, the one a classifier is surest of (the paper's "-re")."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from var_jax.errors import UserError
from var_jax.model import Samples


class Rejecting:
  """A `Model` whose `sample` draws `best_of` candidates an image and keeps the one with the highest log probability.

  classifier: a jax.export artifact, uint8 images (b, H, W, 3) -> logits (b, classes). Candidate j of image i is drawn
  from (seed, i * best_of + j). UserError for an artifact that cannot be read or takes other images.
  """

  def __init__(self, model, classifier, best_of):
    self.tokenizer, self.generator, self.check_labels = model.tokenizer, model.generator, model.check_labels
    self._model, self._best_of, self._path = model, best_of, pathlib.Path(classifier)
    try:
      self._content = self._path.read_bytes()
      self._artifact = export.deserialize(bytearray(self._content))
    except Exception as error:  # whatever foreign bytes make jax raise
      raise UserError(f'{classifier} is no readable jax.export artifact ({error or type(error).__name__}): give one of '
                      'a classifier, images (b, H, W, 3) uint8 -> logits (b, classes)') from error
    here = export.default_export_platform()
    if here not in self._artifact.platforms:
      raise UserError(f'{classifier} is for {", ".join(self._artifact.platforms)}, this machine has {here}: export it '
                      'for that')
    outputs = self._artifact.out_avals
    if len(outputs) != 1 or outputs[0].ndim != 2 or not jnp.issubdtype(outputs[0].dtype, jnp.floating):
      raise UserError(f'{classifier} gives {", ".join(map(str, outputs))}: give an artifact of a classifier, images '
                      '(b, H, W, 3) uint8 -> logits (b, classes) in floating point')
    self._call = jax.jit(self._artifact.call)

  @property
  def identity(self):
    return f'{self._model.identity} {self._best_of} {hashlib.sha256(self._content).hexdigest()[:12]}'

  def sample(self, labels, seed=0, *, first=0, batch_size=64, **options):
    """As `Model.sample`."""
    candidates = np.repeat(np.asarray(labels, np.int32), self._best_of)
    drawn = self._model.sample(candidates, seed, first=first * self._best_of, batch_size=batch_size, **options)
    scores = np.concatenate([self._score(drawn.images[start:start + batch_size], drawn.labels[start:start + batch_size])
                             for start in range(0, len(candidates), batch_size)])
    best = scores.reshape(-1, self._best_of).argmax(axis=1) + np.arange(len(labels)) * self._best_of
    return Samples(*(x[best] for x in drawn))

  def _score(self, images, labels):
    """(N,) log probability of each image's label."""
    try:
      logits = np.asarray(self._call(images), np.float64)
    except (TypeError, ValueError) as error:
      text = ' '.join(str(error).split())[:160]
      raise UserError(f'{self._path} does not take images of {images.shape[1]}x{images.shape[2]} pixels ({text}): '
                      'give an artifact of a classifier for them') from error
    if logits.ndim != 2 or logits.shape[1] <= labels.max():
      raise UserError(f'{self._path} gives {logits.shape[1:]} numbers an image, the label {labels.max()} needs more: '
                      'give a classifier of the same classes')
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.arange(len(labels)), labels]
