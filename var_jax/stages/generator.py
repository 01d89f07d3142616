"""The generator stage: cross entropy of every scale given the coarser ones, on a frozen tokenizer's tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from var_jax import axes, pictures
from var_jax.data.floats import floats
from var_jax.data.images import to_uint8
from var_jax.errors import UserError
from var_jax.generator import losses, sampling
from var_jax.generator.transformer import drop_path_factors
from var_jax.training import optimizer as optimizer_lib
from var_jax.training.state import TrainState, accumulated


def _of_scales(params, pyramid):
  """A generator's parameters for a pyramid of the first scales alone."""
  tables = {'position': pyramid.length, 'level_embedding': len(pyramid)}
  return params | {name: params[name][:rows] for name, rows in tables.items() if rows < len(params[name])}


class GeneratorStage:
  """Trains a `Generator`. See `training.loop.train` for what the loop asks of a stage.

  fingerprint: of the tokenizer's parameters; every checkpoint carries it. initial: parameters to begin with, None for
  new ones. guide: parameters of the model whose guidance is learned, with config.distill.
  """

  name = 'generator'

  def __init__(self, config, generator, tokenizer, tokenizer_params, fingerprint, steps, initial=None, guide=None):
    self.config, self.generator, self.tokenizer, self.steps = config, generator, tokenizer, steps
    self.image_size = tokenizer.image_size
    self.frozen = {'tokenizer': tokenizer_params} | ({'guide': guide} if config.distill else {})
    self.metadata = {'tokenizer': fingerprint}
    self.optimizer = optimizer_lib.from_config(config.optimizer, steps, config.freeze)
    self.initial = initial

  def init(self, initial=None):
    """The state before the first step, without what is frozen. initial: parameters, None for new ones. Pure."""
    generator, key = self.generator, jax.random.fold_in(jax.random.key(self.config.seed), 0)
    teacher = jnp.zeros((1, generator.pyramid.length - generator.pyramid.sizes[0], generator.channels))
    params = initial or generator.init(key, jnp.zeros(1, jnp.int32), teacher)['params']
    return TrainState.create(self.config.seed, params, self.optimizer, ema=bool(self.config.ema))

  def check_metadata(self, metadata):
    """Raises UserError when a checkpoint was trained on another tokenizer's tokens."""
    if metadata is not None and metadata.get('tokenizer') != self.metadata['tokenizer']:
      raise UserError(
          f'this generator was trained with another tokenizer (fingerprint {metadata.get("tokenizer")}, given '
          f'{self.metadata["tokenizer"]}): point --config.tokenizer at the workdir it was trained with')

  def phase(self, step):
    """How many scales progressive training computes at a step, a number: the later ones weigh nothing yet."""
    config, pyramid = self.config, self.generator.pyramid
    if not config.progressive.end:
      return len(pyramid)
    return losses.taking_part(step, self.steps, pyramid, **self._joining())

  def train_step(self, state, batch, phase=None):
    """(state, metrics) after one step. Pure. phase: of this step, see there; None computes all scales."""
    scales = len(self.generator.pyramid) if phase is None else phase
    loss = lambda params, part, key: self._loss(params, self.encode_batch(state, part), key, state, scales)
    grads, metrics = accumulated(loss, state.params, batch, state.step_key, self.config.accumulate)
    state, more = state.updated(grads, self.optimizer, ema_decay=self.config.ema)
    return state, metrics | more

  def encode_batch(self, state, batch):
    """What the generator learns from: labels, tokens and teacher-forcing input of a batch of images, or of tokens."""
    variables = {'params': state.frozen['tokenizer']}
    tokens_BxL = batch.get('tokens')
    if tokens_BxL is None:
      tokens_BxL = self.tokenizer.apply(variables, floats(batch['image']), method='encode')
    teacher_BxMxC = self.tokenizer.apply(variables, tokens_BxL, method='teacher_input')
    return {'label': batch['label'], 'tokens': tokens_BxL, 'teacher': teacher_BxMxC}

  def _loss(self, params, batch, key, state, scales):
    """(loss, metrics) of the first scales, which the others cannot change; a mean over all, as if those were zero."""
    config, generator, whole = self.config, self.generator, self.generator.pyramid
    generator = generator.clone(pyramid=dataclasses.replace(whole, scales=whole.scales[:scales]))
    pyramid, params = generator.pyramid, _of_scales(params, generator.pyramid)
    label_key, path_key = jax.random.split(key)
    labels_B, tokens_BxL = batch['label'], batch['tokens'][:, :pyramid.length]
    teacher_BxMxC = batch['teacher'][:, :pyramid.length - pyramid.sizes[0]]
    dropped_B = jax.random.bernoulli(label_key, config.label_drop, labels_B.shape)
    labels_B = jnp.where(dropped_B, generator.classes, labels_B)
    keep = drop_path_factors(path_key, generator.depth, len(labels_B), config.drop_path) if config.drop_path else None
    # On a CPU, putting what the backward pass needs into arrays of all blocks takes a sixth of the step.
    generator = generator.clone(unroll=axes.one_cpu())
    logits_BxLxV = generator.apply({'params': params}, labels_B, teacher_BxMxC, keep)
    metrics = losses.summarize(logits_BxLxV, tokens_BxL, pyramid, label_smoothing=config.label_smoothing)
    if scales < len(whole):  # the last of these is not the last
      metrics = {name: value for name, value in metrics.items() if not name.endswith('/last')}
    if config.distill:
      guided_BxLxV = self._guided(generator, state.frozen['guide'], labels_B, teacher_BxMxC)
      loss_BxL = losses.divergence(guided_BxLxV, logits_BxLxV)
      metrics['distillation'] = jnp.mean(loss_BxL)
    else:
      loss_BxL = losses.token_losses(logits_BxLxV, tokens_BxL, config.label_smoothing)
    loss = jnp.mean(loss_BxL * self._weights(state.step, pyramid))
    return loss if scales == len(whole) else loss * pyramid.length / whole.length, metrics

  def _weights(self, step, pyramid):
    """(L,) weights of the tokens of a pyramid, the first scales of the whole one, in the loss, or 1."""
    config, whole, weight_L = self.config, self.generator.pyramid, jnp.ones(())
    if config.progressive.end:
      weight_L = losses.progressive_weights(
          step, self.steps, whole, ramp=round(config.progressive.ramp * self.steps), **self._joining())
    if config.scale_weights.sigma:
      weight_L *= losses.scale_weights(whole, **config.scale_weights)
    return weight_L[:pyramid.length] if weight_L.ndim else 1.0

  def _joining(self):
    """When scales join progressive training, for `losses`."""
    config = self.config
    return dict(start_scale=config.progressive.start_scale, end=config.progressive.end,
                warmup=round(config.optimizer.warmup * self.steps))

  def _guided(self, generator, params, labels_B, teacher_BxMxC):
    """(B, L, V) logits of a model with the guidance that sampling would give them, see `sampling.sample`.

    generator: for the first scales, which `teacher_BxMxC` is of.
    """
    pyramid, last = generator.pyramid, len(self.generator.pyramid) - 1
    labels_2B, params = sampling.with_no_class(labels_B, generator), _of_scales(params, pyramid)
    logits = generator.clone(unroll=False).apply(
        {'params': params}, labels_2B, jnp.repeat(teacher_BxMxC, 2, axis=0))
    t_L = self.config.distill * pyramid.level_L / max(last, 1)
    return jax.lax.stop_gradient(sampling.guided(logits, t_L[:, None]))

  def eval_step(self, state, batch):
    """Sums over the images of a batch, without label drop, drop-path and smoothing."""
    encoded = self.encode_batch(state, batch)
    logits = self.generator.apply({'params': state.model}, encoded['label'], encoded['teacher'])
    means = losses.summarize(logits, encoded['tokens'], self.generator.pyramid, batch['mask'])
    images = batch['mask'].sum()
    return {name: value * images for name, value in means.items()} | {'images': images}

  def summarize(self, sums):
    """Scalars from the sums of all batches."""
    return {name: value / sums['images'] for name, value in sums.items() if name != 'images'}

  def pictures(self, state, batch):
    """Samples from a fixed seed: a row for each of the first ten classes, eight images a row."""
    rows, columns = min(self.generator.classes, 10), 8
    labels = jnp.repeat(jnp.arange(rows), columns)
    keys = sampling.image_keys(0, jnp.arange(len(labels)))
    choices = sampling.Choices(**self.config.sample)
    draw = jax.jit(lambda params, labels, keys: sampling.sample(
        self.generator, self.tokenizer, params, labels, keys, choices).image_BxHxWx3, out_shardings=axes.everywhere())
    params = {'generator': state.model, 'tokenizer': state.frozen['tokenizer']}
    images = to_uint8(draw(params, labels, keys))
    return {'samples': pictures.grid(images.reshape(rows, columns, *images.shape[1:]))}
