"""AdamW with the published schedules for learning rate and weight decay."""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('cos', 'lin', 'lin0', 'lin00', 'exp')


def learning_rate(kind, peak, steps, warmup, start_ratio=0.005, end_ratio=0.1):
  """Schedule step -> rate: linear from start_ratio·peak over `warmup` steps, then down to end_ratio·peak at the last.

  kind: cos; lin, lin0, lin00 (flat for 15, 5, 0 % of the rest, then linear); exp (flat for 15 %, then exponential).
  """
  flat = {'lin': 0.15, 'lin0': 0.05, 'lin00': 0.0, 'exp': 0.15, 'cos': 0.0}[kind]

  def schedule(step):
    rising = start_ratio + (1 - start_ratio) * step / max(warmup, 1)
    passed = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0, 1)
    if kind == 'cos':
      falling = end_ratio + (1 - end_ratio) * (0.5 + 0.5 * jnp.cos(jnp.pi * passed))
    elif kind == 'exp':
      falling = end_ratio ** jnp.maximum((passed - flat) / (1 - flat), 0)
    else:
      falling = end_ratio + (1 - end_ratio) * (1 - passed) / (1 - flat)
      falling = jnp.where(passed < flat, 1.0, falling)
    return peak * jnp.where(step < warmup, rising, falling)

  return schedule


def weight_decay(start, end, steps):
  """Schedule step -> decay, from start to end by half a cosine."""
  return lambda step: end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * jnp.clip(step / max(steps - 1, 1), 0, 1)))


def is_decayed(path, _):
  """Weight decay holds kernels and the class embedding; biases, norms, positions, scales and codes go free."""
  return path[-1].key in ('kernel', 'class_embedding')


def adamw(rate, decay=0.0, betas=(0.9, 0.95), eps=1e-8, clip=0.0):
  """AdamW as PyTorch computes it; rate and decay are numbers or schedules; clip: global gradient norm, 0 for none."""
  return optax.chain(
      optax.clip_by_global_norm(clip) if clip else optax.identity(),
      optax.scale_by_adam(*betas, eps=eps),
      optax.add_decayed_weights(decay, mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params)),
      optax.scale_by_learning_rate(rate),
  )


def from_config(config, steps):
  """The optimizer of `config.optimizer` (see configs.py) for a run of `steps` steps."""
  rate = learning_rate(
      config.schedule, config.peak_lr, steps, round(config.warmup * steps), config.start_ratio, config.end_ratio)
  decay = weight_decay(config.decay, config.decay_end, steps)
  return adamw(rate, decay, tuple(config.betas), clip=config.clip)
