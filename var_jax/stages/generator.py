"""The generator stage: cross entropy of every scale given the coarser ones, on a frozen tokenizer's tokens."""

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

  def train_step(self, state, batch):
    """(state, metrics) after one step. Pure."""
    loss = lambda params, part, key: self._loss(params, self.encode_batch(state, part), key, state)
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

  def _loss(self, params, batch, key, state):
    config, generator, pyramid = self.config, self.generator, self.generator.pyramid
    label_key, path_key = jax.random.split(key)
    labels_B, tokens_BxL = batch['label'], batch['tokens']
    dropped_B = jax.random.bernoulli(label_key, config.label_drop, labels_B.shape)
    labels_B = jnp.where(dropped_B, generator.classes, labels_B)
    keep = drop_path_factors(path_key, generator.depth, len(labels_B), config.drop_path) if config.drop_path else None
    # On a CPU, putting what the backward pass needs into arrays of all blocks takes a sixth of the step.
    generator = generator.clone(unroll=axes.one_cpu())
    logits_BxLxV = generator.apply({'params': params}, labels_B, batch['teacher'], keep)
    metrics = losses.summarize(logits_BxLxV, tokens_BxL, pyramid, label_smoothing=config.label_smoothing)
    if config.distill:
      guided_BxLxV = self._guided(state.frozen['guide'], labels_B, batch['teacher'])
      loss_BxL = losses.divergence(guided_BxLxV, logits_BxLxV)
      metrics['distillation'] = jnp.mean(loss_BxL)
    else:
      loss_BxL = losses.token_losses(logits_BxLxV, tokens_BxL, config.label_smoothing)
    return jnp.mean(loss_BxL * self._weights(state.step)), metrics

  def _weights(self, step):
    """(L,) weights of the tokens in the loss, or 1."""
    config, pyramid, weight_L = self.config, self.generator.pyramid, 1.0
    if config.progressive.end:
      weight_L = losses.progressive_weights(
          step, self.steps, pyramid, start_scale=config.progressive.start_scale, end=config.progressive.end,
          warmup=round(config.optimizer.warmup * self.steps), ramp=round(config.progressive.ramp * self.steps))
    if config.scale_weights.sigma:
      weight_L *= losses.scale_weights(pyramid, **config.scale_weights)
    return weight_L

  def _guided(self, params, labels_B, teacher_BxMxC):
    """(B, L, V) logits of a model with the guidance that sampling would give them, see `sampling.sample`."""
    pyramid = self.generator.pyramid
    labels_2B = sampling.with_no_class(labels_B, self.generator)
    logits = self.generator.apply({'params': params}, labels_2B, jnp.repeat(teacher_BxMxC, 2, axis=0))
    t_L = self.config.distill * pyramid.level_L / max(len(pyramid) - 1, 1)
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
