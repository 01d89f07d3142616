"""A trained model for notebooks and commands: `model = var_jax.load(DIR); model.sample([3, 7], seed=0)`."""

import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax import progress
from var_jax import workdir as workdir_lib
from var_jax.data.images import to_float, to_uint8
from var_jax.errors import UserError
from var_jax.generator import sampling
from var_jax.training import checksums
from var_jax.training import mesh as mesh_lib


class Samples(NamedTuple):
  """images (N, H, W, 3) uint8, labels (N,) int32, tokens (N, L) int32."""

  images: Any
  labels: Any
  tokens: Any


class Model:
  """What a workdir holds. A tokenizer's workdir encodes and decodes; a generator's samples as well.

  Work is done in batches of one size over the mesh (default: all devices); the last one is filled up. Of several
  processes each has to make the same calls, and gets the same results.
  low_memory: each device encodes and decodes image after image; bfloat16: the generator's kernels are kept in it.
  class_names: in the order of the labels, where the workdir keeps them.
  """
  class_names = None

  def __init__(self, tokenizer, tokenizer_params, generator=None, generator_params=None, mesh=None, *,
               low_memory=False, bfloat16=False):
    self.tokenizer, self.generator = tokenizer.clone(at_a_time=1) if low_memory else tokenizer, generator
    self.mesh = mesh or mesh_lib.make_mesh()
    if generator and bfloat16:
      generator_params = jax.tree_util.tree_map_with_path(_kernel_in_bfloat16, generator_params)
    params = {'tokenizer': tokenizer_params} | ({'generator': generator_params} if generator else {})
    self.params = mesh_lib.put_state(params, self.mesh)

  @property
  def identity(self):
    """A text that names the parameters."""
    return hashlib.sha256(json.dumps(checksums.of(self.params)).encode()).hexdigest()[:12]

  def __repr__(self):
    kind = 'tokenizer' if self.generator is None else f'generator of depth {self.generator.depth}'
    return f'Model({kind}, {"x".join(map(str, self.tokenizer.image_size))} px, {self.tokenizer.pyramid})'

  def sample(self, labels, seed=0, *, cfg=1.5, top_k=900, top_p=0.96, temperature=1.0, smooth=False, first=0,
             batch_size=64, progress=False):
    """Draws one image per label: `Samples`. Image i depends on (seed, first + i) and its label alone.

    labels: N class numbers; top_k, top_p: 0 turns the filter off. UserError for a label or value out of range.
    """
    labels, index = self.check_labels(labels), np.arange(first, first + np.size(labels), dtype=np.uint32)
    run = self._sampler(seed, cfg, top_k, top_p, temperature, smooth)
    images, tokens = self._in_batches(run, (labels, index), batch_size, 'sampling' if progress else None)
    return Samples(images, labels, tokens)

  def edit(self, images, redraw, labels=None, seed=0, *, cfg=1.5, top_k=900, top_p=0.96, temperature=1.0,
           smooth=False, batch_size=64, progress=False):
    """Draws a part of each image anew and keeps the tokens of the rest (paper, sec. 4.4): `Samples`.

    images: as for `encode`; redraw: (N, H, W) bool, True where to draw: a token stays when none of its pixels is to be
    drawn, and the 1x1 scale stays always. labels: classes of the new parts, None for none of them.
    """
    self._check_generator()
    tokens, redraw = self.encode(images, batch_size=batch_size), np.asarray(redraw)
    (height, width), stride = self.tokenizer.image_size, self.tokenizer.stride
    if redraw.shape != (len(tokens), height, width) or redraw.dtype != bool:
      raise UserError(f'redraw must be bool ({len(tokens)}, {height}, {width}), not {redraw.dtype} {redraw.shape}')
    keep = ~redraw.reshape(-1, height // stride, stride, width // stride, stride).any(axis=(2, 4))
    no_class = np.full(len(tokens), self.generator.classes, np.int32)
    labels = no_class if labels is None else self.check_labels(labels)
    if len(labels) != len(tokens):
      raise UserError(f'{len(labels)} labels for {len(tokens)} images: give one each')
    run = self._sampler(seed, cfg, top_k, top_p, temperature, smooth)
    arrays = (labels, np.arange(len(tokens), dtype=np.uint32), tokens, keep)
    images, tokens = self._in_batches(run, arrays, batch_size, 'editing' if progress else None)
    return Samples(images, labels, tokens)

  def encode(self, images, *, batch_size=64):
    """(N, H, W, 3) uint8, or float in [-1, 1] -> tokens (N, L) int32, coarse to fine."""
    images = self._check_images(images)
    return self._in_batches(self._tokenize('encode'), (images,), batch_size)[0]

  def decode(self, tokens, *, batch_size=64):
    """(N, L) tokens -> (N, H, W, 3) uint8."""
    tokens = self._check_tokens(tokens)
    return self._in_batches(self._tokenize('decode'), (tokens,), batch_size)[0]

  def decode_every_scale(self, tokens, *, batch_size=16):
    """(N, L) tokens -> (N, K, H, W, 3) uint8: the picture after every scale."""
    tokens = self._check_tokens(tokens)
    return self._in_batches(self._tokenize('decode_every_scale'), (tokens,), batch_size)[0]

  def _sampler(self, seed, cfg, top_k, top_p, temperature, smooth):
    """(labels, indices[, given tokens, keep mask]) -> images, tokens, for one batch."""
    if not 0 <= seed < 2**32:
      raise UserError(f'seed {seed} is out of range: use 0 or more, and at most {2**32 - 1}')
    check_choices(cfg, top_k, top_p, temperature)
    draw = self._jitted_sampler(int(top_k), top_p > 0, cfg > 0, bool(smooth))
    numbers = (np.uint32(seed), np.float32(cfg), np.float32(top_p), np.float32(temperature))
    return lambda labels, index, *given: draw(self.params, labels, index, *numbers, given or None)

  @functools.cache
  def _jitted_sampler(self, top_k, use_top_p, use_cfg, smooth):
    @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(self.mesh))
    def draw(params, labels_B, index_B, seed, cfg, top_p, temperature, given):
      choices = sampling.Choices(
          cfg if use_cfg else 0.0, top_k, top_p if use_top_p else 0.0, temperature, smooth)
      keys_B = sampling.image_keys(seed, index_B)
      out = sampling.sample(self.generator, self.tokenizer, params, labels_B, keys_B, choices, given)
      return out.image_BxHxWx3, out.tokens_BxL

    return draw

  @functools.cache
  def _tokenize(self, method):
    apply = jax.jit(lambda params, x: self.tokenizer.apply({'params': params}, x, method=method),
                    out_shardings=mesh_lib.replicated(self.mesh))
    return lambda x: (apply(self.params['tokenizer'], x),)

  def _in_batches(self, run, arrays, batch_size, title=None):
    """Runs batches of one fixed size over all devices; images come back as uint8."""
    count, devices = len(arrays[0]), mesh_lib.batch_parts(self.mesh)
    if not count:
      raise UserError('there is nothing to do: give at least one image, label or row of tokens')
    batch_size = -(-min(max(batch_size, 1), count) // devices) * devices
    parts = []
    for start in progress.bar(range(0, count, batch_size), title=title, unit='batch', show=title is not None):
      part = [np.resize(a[start:start + batch_size], (batch_size, *a.shape[1:])) for a in arrays]
      with jax.set_mesh(self.mesh):
        out = run(*(mesh_lib.put_whole(a, self.mesh) for a in part))
      out = [to_uint8(np.asarray(x)) if x.dtype == jnp.float32 else np.asarray(x) for x in out]
      parts.append([x[:count - start] for x in out])
    return [np.concatenate(column) for column in zip(*parts)]

  def _check_generator(self):
    if self.generator is None:
      raise UserError('this workdir holds a tokenizer only: give the workdir of a generator')

  def check_labels(self, labels):
    """(N,) labels as int32. Raises UserError for labels that the model cannot draw."""
    self._check_generator()
    labels, classes = np.atleast_1d(np.asarray(labels)), self.generator.classes
    if not labels.size:
      raise UserError('no labels: give at least one class number')
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
      raise UserError(f'labels must be whole numbers, not {labels.tolist()!r}')
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
      raise UserError(f'label {bad[0]} does not exist: this model has the classes 0 to {classes - 1}')
    return labels.astype(np.int32)

  def _check_images(self, images):
    images, size = np.asarray(images), self.tokenizer.image_size
    if images.ndim != 4 or images.shape[1:] != (*size, 3):
      raise UserError(f'images must be (N, {size[0]}, {size[1]}, 3), not {images.shape}: resize them first')
    if images.dtype == np.uint8:
      return to_float(images)
    if not np.all(np.abs(images) <= 1 + 1e-5):
      raise UserError('images that are not uint8 must lie in [-1, 1]: scale them, or pass uint8')
    return images.astype(np.float32)

  def _check_tokens(self, tokens):
    tokens, length, codes = np.asarray(tokens), self.tokenizer.pyramid.length, self.tokenizer.codes
    if not np.issubdtype(tokens.dtype, np.integer):
      raise UserError(f'tokens must be whole numbers, not {tokens.dtype}')
    if tokens.ndim != 2 or tokens.shape[1] != length:
      raise UserError(f'tokens must be (N, {length}), not {tokens.shape}')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < codes:
      raise UserError(f'tokens must lie between 0 and {codes - 1}')
    return tokens.astype(np.int32)


def check_choices(cfg, top_k, top_p, temperature):
  """Raises UserError for values that nothing can be drawn with."""
  if not 0 <= cfg <= 100:
    raise UserError(f'cfg {cfg} is not between 0 (no guidance) and 100; 1.5 is usual')
  if top_k < 0:
    raise UserError(f'top_k {top_k} is negative: use 0 to turn it off')
  if not 0 <= top_p <= 1:
    raise UserError(f'top_p {top_p} is not between 0 and 1; 0 turns it off')
  if not temperature > 0:
    raise UserError(f'temperature {temperature} is not above 0: use top_k=1 for the likeliest tokens')


def _kernel_in_bfloat16(path, x):
  return x.astype(jnp.bfloat16) if path[-1].key == 'kernel' else x


def load(workdir, *, raw=False, **saving):
  """The model of a workdir, from its newest readable checkpoint. UserError when there is none.

  raw: the parameters themselves where the run keeps an average of them (EMA); a generator's tokenizer stays as it is.
  saving: low_memory and bfloat16, see `Model`.
  """
  config = workdir_lib.read_config(workdir)
  mesh = mesh_lib.fitting(config.mesh)
  if config.stage == 'tokenizer':
    model = Model(*workdir_lib.load_tokenizer(workdir, raw=raw), mesh=mesh, **saving)
  else:
    generator, params, tokenizer, tokenizer_params = workdir_lib.load_generator(pathlib.Path(workdir), raw=raw)
    model = Model(tokenizer, tokenizer_params, generator, params, mesh, **saving)
  model.class_names = workdir_lib.class_names(workdir)
  return model
