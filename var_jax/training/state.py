"""What a run carries from step to step, and the one way to change it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """A stage's state: a pytree, the same on every device.

  step: () int32, steps taken; key: raw key of the run, randomness is fold_in(key, step); params, opt_state, ema: of the
  model (ema None when off); extra: what a stage trains or counts beside the model; frozen: inputs that never change
  (not saved); skipped, skipped_in_row: () int32, steps left out because their gradients were not finite.
  """

  step: Any
  key: Any
  params: Any
  opt_state: Any
  ema: Any = None
  extra: Any = None
  frozen: Any = None
  skipped: Any = 0
  skipped_in_row: Any = 0

  @classmethod
  def create(cls, seed, params, optimizer, *, ema, extra=None):
    """The state before the first step, without `frozen`. ema: whether to keep an average of the parameters."""
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # own buffers, since the state is donated
    copy = jax.tree.map(jnp.copy, params) if ema else None
    key = jax.random.key_data(jax.random.key(seed))
    return cls(step, key, params, optimizer.init(params), copy, extra, None, skipped, in_row)

  @property
  def model(self):
    """The parameters to use for evaluation and sampling: the average if there is one."""
    return self.params if self.ema is None else self.ema

  @property
  def step_key(self):
    return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)

  def updated(self, grads, optimizer, *, ema_decay=0.0, extra=None, norm=None):
    """(next state, metrics) after one optimizer step. Where `norm` is not finite, all but the counters stays.

    extra: the stage's own part after the step; norm: of all gradients that went into the step (default: of grads).
    """
    norm = optax.tree.norm(grads) if norm is None else norm
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
    params, ema = optax.apply_updates(self.params, updates), self.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1 + self.step) / (10 + self.step))  # a young average follows quickly
      # In this form the average of what stays, such as frozen parameters, stays bit for bit.
      ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
    old = (self.params, self.opt_state, self.ema, self.extra)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (params, opt_state, ema, extra), old)
    bad = 1 - finite.astype(jnp.int32)
    new = self.replace(
        step=self.step + 1, params=kept[0], opt_state=kept[1], ema=kept[2], extra=kept[3],
        skipped=self.skipped + bad, skipped_in_row=bad * (self.skipped_in_row + 1))
    return new, {'gradient_norm': norm, 'skipped': new.skipped, 'skipped_in_row': new.skipped_in_row}


def accumulated(loss_and_metrics, params, batch, key, parts):
  """Gradient of a mean loss over a batch, taken in `parts` slices one after the other to save memory.

  loss_and_metrics(params, batch, key) -> (loss, metrics). Returns (gradients, metrics), means over the slices.
  """
  gradient = jax.grad(loss_and_metrics, has_aux=True)
  if parts == 1:
    return gradient(params, batch, key)
  # Slice i takes every parts-th image, so that each device's share of a slice lies on that device already.
  sliced = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

  def add(total, item):
    i, part = item
    return jax.tree.map(jnp.add, total, gradient(params, part, jax.random.fold_in(key, i))), None

  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], sliced), key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), sliced))
  return jax.tree.map(lambda x: x / parts, total)
