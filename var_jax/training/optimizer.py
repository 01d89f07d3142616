"""AdamW with the published schedules for learning rate and weight decay."""

import fnmatch

import jax
import jax.numpy as jnp
import optax

from var_jax.errors import UserError

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


def joining_later(config, peak, steps, start):
  """Schedule step of the run -> rate of what begins at step `start`: the run's own, but with a warm-up from there.

  config: `config.optimizer` of the run; peak: in place of its peak_lr.
  """
  warmup, run = round(config.warmup * steps), rate_of(config, steps, peak)

  def schedule(step):
    warm = jnp.clip((step - start) / max(warmup, 1), 0, 1) if warmup else 1.0
    return run(jnp.maximum(step, warmup)) * (config.start_ratio + (1 - config.start_ratio) * warm)

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


def frozen_names(params, patterns):
  """Names 'a/b/c' of the parameters that comma-separated patterns name; UserError for a pattern without a match."""
  names = ['/'.join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  found = set()
  for pattern in filter(None, patterns.split(',')):
    matches = fnmatch.filter(names, pattern)
    if not matches:
      tops = sorted({name.split('/')[0] for name in names})
      raise UserError(f'freeze={pattern!r} names no parameter: use patterns such as {tops[0]}/*; there are '
                      f'{", ".join(tops)}')
    found.update(matches)
  return found


def freeze(optimizer, patterns):
  """The optimizer for all parameters but those that comma-separated patterns name, which stay as they are."""
  if not patterns:
    return optimizer

  def labels(params):
    frozen = frozen_names(params, patterns)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 'frozen' if '/'.join(key.key for key in path) in frozen else 'trained', params)

  return optax.partition({'trained': optimizer, 'frozen': optax.set_to_zero()}, labels)


def rate_of(config, steps, peak=None):
  """The schedule of the learning rate that `config.optimizer` says for a run of `steps` steps; peak: not its own."""
  return learning_rate(config.schedule, config.peak_lr if peak is None else peak, steps, round(config.warmup * steps),
                       config.start_ratio, config.end_ratio)


def from_config(config, steps, frozen=''):
  """The optimizer of `config.optimizer` (see configs.py) for a run of `steps` steps; frozen: see `freeze`."""
  rate = rate_of(config, steps)
  decay = weight_decay(config.decay, config.decay_end, steps)
  return freeze(adamw(rate, decay, tuple(config.betas), clip=config.clip), frozen)
