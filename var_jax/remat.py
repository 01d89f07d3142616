"""What the backward pass computes again instead of keeping it in memory."""

import flax.linen as nn
import jax

POLICIES = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # kept: products with parameters; not attention
    'all': jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(module, kind, **options):
  """A module's class with a policy of POLICIES; options: of `nn.remat`."""
  return module if POLICIES[kind] is None else nn.remat(module, policy=POLICIES[kind], **options)
