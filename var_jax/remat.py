"""What the backward pass computes again instead of keeping it in memory."""

import flax.linen as nn
import jax

ATTENTION = 'attention'  # `checkpoint_name` of what attention's backward pass needs beside queries, keys and values


def _products(primitive, *inputs, **parameters):
  """Keeps products with parameters, and convolutions: a whole one where `convolution.winograd` does it."""
  winograd = primitive.name == 'custom_vjp_call' and len(inputs) > 1  # of one input is `products.own_gradient`
  return winograd or primitive.name == 'conv_general_dilated' or (
      jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters))


POLICIES = {
    'none': None,
    'pointwise': jax.checkpoint_policies.save_from_both_policies(  # kept: all products; norms, GELU and sums are not
        _products, jax.checkpoint_policies.save_only_these_names(ATTENTION)),
    'dots': _products,  # of attention, nothing is kept
    'all': jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(module, kind, **options):
  """A module's class with a policy of POLICIES; options: of `nn.remat`."""
  return module if POLICIES[kind] is None else nn.remat(module, policy=POLICIES[kind], **options)
