"""The tokenizer stage: reconstruction, quantizer, perceptual and adversarial losses, and a codebook kept alive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from var_jax import axes, pictures
from var_jax.data.floats import floats
from var_jax.data.images import to_uint8
from var_jax.tokenizer import losses, lpips
from var_jax.tokenizer.discriminator import PatchDiscriminator
from var_jax.training import optimizer as optimizer_lib
from var_jax.training.state import TrainState, accumulated

# A code has been unused for long when each has been due so often: one in 3,000 of those used as often as all others
# would go so long unused by chance.
TOKENS_A_CODE = 8


class TokenizerStage:
  """Trains a `Tokenizer`. See `training.loop.train` for what the loop asks of a stage.

  initial: parameters to begin with, None for new ones. lpips_params: see `lpips.load`, where the loss asks for it.
  """

  name = 'tokenizer'
  metadata = {}

  def __init__(self, config, tokenizer, steps, initial=None, lpips_params=None):
    self.config, self.tokenizer, self.steps = config, tokenizer, steps
    self.image_size = tokenizer.image_size
    self.optimizer = optimizer_lib.from_config(config.optimizer, steps, config.freeze)
    self.initial = initial
    self.discriminator = PatchDiscriminator(config.loss.discriminator_ch, dtype=tokenizer.dtype)
    self.starts = round(config.loss.adversarial_start * steps)  # the step from which the discriminator works
    self.discriminator_rate = optimizer_lib.joining_later(
        config.optimizer, config.loss.discriminator_lr, steps, self.starts)
    self.discriminator_optimizer = optimizer_lib.adamw(1.0, betas=(0.5, 0.9), clip=1.0)  # times the rate of the step
    self.frozen = {'lpips': lpips_params} if config.loss.lpips else None

  def init(self, initial=None):
    """The state before the first step, without what is frozen. initial: parameters, None for new ones. Pure."""
    config, image = self.config, jnp.zeros((1, *self.image_size, 3))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    params = initial or self.tokenizer.init(key, image)['params']
    extra = {}
    if config.loss.adversarial:
      extra['discriminator'] = self.discriminator.init(jax.random.fold_in(key, 1), image)['params']
      extra['discriminator_optimizer'] = self.discriminator_optimizer.init(extra['discriminator'])
    if config.codebook.restart_every:
      extra['idle_V'] = jnp.zeros(self.tokenizer.codes, jnp.int32)  # steps since a code was used
    return TrainState.create(config.seed, params, self.optimizer, ema=bool(config.ema), extra=extra)

  def check_metadata(self, metadata):
    """Nothing: a tokenizer depends on no other model."""

  def phase(self, step):
    """None: all steps are one program."""

  def train_step(self, state, batch, phase=None):
    """(state, metrics) after one step. Pure."""
    key = state.step_key
    trained = {'model': state.params, 'discriminator': state.extra.get('discriminator')}
    fixed = (state.frozen, state.step)
    loss = lambda params, part, part_key: self._loss(params, part, part_key, *fixed)
    grads, metrics = accumulated(loss, trained, {'image': batch['image']}, key, self.config.accumulate)
    extra, every = dict(state.extra), self.config.codebook.restart_every
    if self.config.loss.adversarial:
      extra |= self._discriminator_step(state, grads['discriminator'])
    if every:
      extra['idle_V'] = jnp.where(metrics.pop('used_V') > 0, 0, extra['idle_V'] + 1)
    state, more = state.updated(
        grads['model'], self.optimizer, ema_decay=self.config.ema, extra=extra, norm=optax.tree.norm(grads))
    if every:
      slices = batch['image'].reshape(-1, self.config.accumulate, *batch['image'].shape[1:])
      images = floats(slices[:, 0])  # no more than a step has in memory at a time
      restart = lambda s: self._restart_dead_codes(s, images, len(batch['image']), jax.random.fold_in(key, 2))
      due = (state.step % every == 0) & (state.skipped_in_row == 0)
      state = jax.lax.cond(due, restart, lambda s: s, state)
    return state, metrics | more

  def _discriminator_step(self, state, gradient):
    """The discriminator's part of `extra` after a step: until it starts, its optimizer counts nothing."""
    old = {name: state.extra[name] for name in ('discriminator', 'discriminator_optimizer')}
    updates, optimizer_state = self.discriminator_optimizer.update(
        gradient, old['discriminator_optimizer'], old['discriminator'])
    rate = self.discriminator_rate(state.step)
    params = optax.apply_updates(old['discriminator'], jax.tree.map(lambda x: rate * x, updates))
    new = {'discriminator': params, 'discriminator_optimizer': optimizer_state}
    return jax.tree.map(lambda a, b: jnp.where(state.step >= self.starts, a, b), new, old)

  def _loss(self, params, batch, key, frozen, step):
    """A scalar whose gradient is the one wanted (not the loss itself, which is among the metrics), and metrics."""
    weights, images = self.config.loss, floats(batch['image'])
    kept_B = self._kept_scales(jax.random.fold_in(key, 1), len(images))
    out = self.tokenizer.apply({'params': params['model']}, images, kept_B, train=True, rngs={'dropout': key})
    drawn = jax.lax.stop_gradient(out.image_BxHxWx3)
    image_loss = lambda image: self._image_loss(image, images, frozen)
    (total, metrics), gradient = jax.value_and_grad(image_loss, has_aux=True)(drawn)
    discriminator_loss = 0.0
    if weights.adversarial:
      gradient, adversarial, discriminator_loss = self._adversarial(
          params['discriminator'], images, drawn, step, gradient)
      metrics |= adversarial
    quantizer_loss = weights.quantizer * out.quantized.loss
    surrogate = jnp.sum(gradient * out.image_BxHxWx3) + quantizer_loss + discriminator_loss
    if self.config.codebook.restart_every:  # not for the log: `train_step` takes it out
      metrics['used_V'] = jnp.zeros(self.tokenizer.codes).at[out.quantized.tokens_BxL].max(1.0)
    return surrogate, metrics | {
        'loss': total + quantizer_loss, 'quantizer': out.quantized.loss, 'psnr': jnp.mean(losses.psnr(images, drawn))}

  def _kept_scales(self, key, count):
    """(B,) how many scales each image is decoded from, so that coarse scales learn to say something; None for all."""
    rate, scales = self.config.codebook.scale_dropout, len(self.tokenizer.pyramid)
    if not rate or scales == 1:
      return None
    drop_key, kept_key = jax.random.split(key)
    kept_B = jax.random.randint(kept_key, (count,), 1, scales)
    return jnp.where(jax.random.bernoulli(drop_key, rate, (count,)), kept_B, scales)

  def _image_loss(self, image, target, frozen):
    weights = self.config.loss
    metrics = {'l1': jnp.mean(jnp.abs(image - target)), 'l2': jnp.mean((image - target) ** 2)}
    loss = weights.l1 * metrics['l1'] + weights.l2 * metrics['l2']
    if weights.lpips:
      precision = 'highest' if self.tokenizer.dtype == jnp.float32 else 'default'
      metrics['lpips'] = jnp.mean(lpips.distance(frozen['lpips'], image, target, precision=precision))
      loss += weights.lpips * metrics['lpips']
    return loss, metrics

  def _adversarial(self, params, images, drawn, step, gradient):
    """(gradient at the image, metrics, the discriminator's loss): before its start the gradient as it is, and zeros."""
    weights = self.config.loss
    logits = lambda p, image: self.discriminator.apply({'params': p}, image)

    def after(params):
      fool = lambda image: -jnp.mean(logits(jax.lax.stop_gradient(params), image))
      pulled, adversarial, factor = losses.balanced(gradient, fool, drawn, weights.adversarial)
      return pulled, adversarial, factor, losses.hinge(logits(params, images), logits(params, drawn))

    gradient, adversarial, factor, hinge = jax.lax.cond(
        step >= self.starts, after, lambda _: (gradient, *[jnp.zeros(())] * 3), params)
    metrics = {'adversarial': adversarial, 'adversarial_factor': factor, 'discriminator': hinge}
    return jax.lax.stop_gradient(gradient), metrics, hinge

  def _restart_dead_codes(self, state, images, batch_size, key):
    """Puts codes that no step used for several checks onto residuals of some images, each scale being as likely.

    The remedy against the collapse that users report at 1x1 and 3x3 with plain VQ losses; off where parity is asked.
    batch_size: images of a step, which tell how many steps it takes to see all codes that are alive.
    """
    out = self.tokenizer.apply({'params': state.params}, images, method='quantize')
    V, pyramid, idle_V = self.tokenizer.codes, self.tokenizer.pyramid, state.extra['idle_V']
    settings, enough = self.config.codebook, math.ceil(TOKENS_A_CODE * V / (batch_size * pyramid.length))
    dead_V = idle_V >= max(settings.restart_every * settings.restart_after, enough)
    likely_L = jnp.asarray(1 / (len(pyramid) * np.asarray(pyramid.sizes))[pyramid.level_L])
    image_key, token_key = jax.random.split(key)
    rows_V = jax.random.randint(image_key, (V,), 0, len(images))
    columns_V = jax.random.choice(token_key, pyramid.length, (V,), p=likely_L)
    fresh_VxC = out.residuals_BxLxC[rows_V, columns_V]
    replace = lambda params: params | {'quantizer': params['quantizer'] | {
        'codebook': jnp.where(dead_V[:, None], fresh_VxC, params['quantizer']['codebook'])}}
    return state.replace(
        params=replace(state.params), ema=None if state.ema is None else replace(state.ema),
        extra=state.extra | {'idle_V': jnp.where(dead_V, 0, idle_V)})

  def eval_step(self, state, batch):
    """Sums over the images of a batch: errors, and how often each code is used at each scale (K, V)."""
    tokenizer, mask_B, images = self.tokenizer, batch['mask'], floats(batch['image'])
    out = tokenizer.apply({'params': state.model}, images)
    image = jnp.clip(out.image_BxHxWx3, -1, 1)
    sums = {'images': mask_B.sum(), 'psnr': jnp.sum(losses.psnr(image, images) * mask_B)}
    sums['l1'] = jnp.sum(jnp.abs(image - images).mean((1, 2, 3)) * mask_B)
    sums['l2'] = jnp.sum(((image - images) ** 2).mean((1, 2, 3)) * mask_B)
    if self.config.loss.lpips:
      sums['lpips'] = jnp.sum(lpips.distance(state.frozen['lpips'], image, images) * mask_B)
    counts = [
        jnp.zeros(tokenizer.codes).at[tokens].add(jnp.broadcast_to(mask_B[:, None], tokens.shape))
        for tokens in tokenizer.pyramid.split(out.quantized.tokens_BxL)]
    return sums | {'counts_KxV': jnp.stack(counts)}

  def summarize(self, sums):
    """Scalars from the sums of all batches. usage: share of the codes seen at a scale; perplexity in codes."""
    scalars = {name: sums[name] / sums['images'] for name in sums if name not in ('images', 'counts_KxV')}
    for k, counts_V in enumerate(sums['counts_KxV']):
      scalars[f'usage/scale_{k}'], scalars[f'perplexity/scale_{k}'] = losses.codebook_use(counts_V)
    scalars['usage'] = np.mean(sums['counts_KxV'].sum(0) > 0)
    return scalars

  def pictures(self, state, batch):
    """Rows of held-out images: the image, then what the first 1, 2, … K scales give."""
    def tiles(params, images):
      images = floats(images[:8])
      tokens = self.tokenizer.apply({'params': params}, images, method='encode')
      scales = self.tokenizer.apply({'params': params}, tokens, method='decode_every_scale')
      return jnp.concatenate([images[:, None], scales], axis=1)

    drawn = jax.jit(tiles, out_shardings=axes.everywhere())(state.model, batch['image'])
    return {'reconstructions': pictures.grid(to_uint8(drawn))}
