"""Convolutions whose gradients are summed in float32, and 3x3 ones on a CPU by Winograd's F(2x2, 3x3).

The latter takes 16 multiplications where 36 are written:
Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), sec. 4.1. Strip by strip, since
the transformed tiles are four times the image and are to stay in the cache. Differs from the direct sum by rounding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax import axes
from var_jax.precision import of_activations

LEAST_CHANNELS = 64  # with fewer, transforming costs more than it saves
CACHE = 2**23  # bytes of a strip's transformed tiles, or of two strips' for a kernel's gradient

INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def product(x_BxHxWxC, kernel_hxwxCxF, strides, padding, *, dimension_numbers, precision=None, **undilated):
  """`jax.lax.conv_general_dilated` without groups and dilation, in x's dtype, to which a float32 kernel is converted.

  Its gradient is a convolution whose result is float32, since devices add up what each has of it. Kernels are put
  together as by `products.gathering`: else devices would add up activations as well.
  """
  direct = lambda x, kernel: jax.lax.conv_general_dilated(
      x, axes.constrain(kernel.astype(x.dtype), None), strides, padding, dimension_numbers=dimension_numbers,
      precision=precision)
  if x_BxHxWxC.dtype == kernel_hxwxCxF.dtype:
    return direct(x_BxHxWxC, kernel_hxwxCxF)
  sides, window = x_BxHxWxC.shape[1:3], kernel_hxwxCxF.shape[:2]
  pads = jax.lax.padtype_to_pads(sides, window, strides, padding) if isinstance(padding, str) else padding

  def gradients(kept, gradient_BxHxWxF):
    x, kernel = kept
    # Each tap's row and column of x, at the strides of the outputs: batch and channels change places.
    ends = [tap + (out - 1) * stride - side - low for tap, out, stride, side, (low, _) in zip(
        window, gradient_BxHxWxF.shape[1:3], strides, sides, pads)]
    to_kernel = jax.lax.conv_general_dilated(
        x, gradient_BxHxWxF, (1, 1), [(low, end) for (low, _), end in zip(pads, ends)], rhs_dilation=strides,
        dimension_numbers=('CHWN', 'IHWO', 'HWNC'), precision=precision, preferred_element_type=kernel.dtype)
    to_x = jax.linear_transpose(lambda x: direct(x, kernel), x)(gradient_BxHxWxF)
    return *to_x, axes.constrain(to_kernel, None)

  mixed = jax.custom_vjp(direct)
  mixed.defvjp(lambda *inputs: (direct(*inputs), inputs), gradients)
  return mixed(x_BxHxWxC, kernel_hxwxCxF)


class Conv(nn.Conv):
  """nn.Conv of images with channels last. Returns its `dtype`; what it learns stays float32 up to product and sum."""

  promote_dtype: Any = of_activations
  conv_general_dilated: Any = product

  @nn.compact
  def __call__(self, x_BxHxWxC):
    return super().__call__(x_BxHxWxC).astype(self.dtype)


def conv_general_dilated(x_BxHxWxC, kernel_3x3xCxF, strides, padding, *, train, **more):
  """`product` for `Conv`, with zeros around the image. train: not to be exported.

  An exported program may run on any platform, and chooses there, which gradients would have to go through.
  """
  direct = lambda x, kernel: product(x, kernel, strides, padding, **more)
  height, width = x_BxHxWxC.shape[1:3]
  suits = (kernel_3x3xCxF.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and padding == 'SAME'
           and height % 2 == width % 2 == 0 and min(kernel_3x3xCxF.shape[2:]) >= LEAST_CHANNELS
           and x_BxHxWxC.dtype == jnp.float32)
  if not suits or axes.devices() > 1 or (train and not axes.one_cpu()):
    return direct(x_BxHxWxC, kernel_3x3xCxF)
  if train:
    return winograd(x_BxHxWxC, kernel_3x3xCxF)
  return jax.lax.platform_dependent(x_BxHxWxC, kernel_3x3xCxF, cpu=winograd, default=direct)


@jax.custom_vjp
@jax.jit
def winograd(x_BxHxWxC, kernel_3x3xCxF):
  """(B, H, W, F): the convolution with zeros around the image; H and W are even."""
  (B, H, W, C), F = x_BxHxWxC.shape, kernel_3x3xCxF.shape[-1]
  kernels_4x4 = _both(KERNEL, kernel_3x3xCxF)

  def one(done, x):
    products_4x4 = [[tile @ kernel for tile, kernel in zip(*rows)] for rows in zip(_tiles(x), kernels_4x4)]
    place = lambda part: part.reshape(B, x.shape[1] // 2 - 1, W // 2, F)
    rows_2 = [jnp.stack([place(part) for part in row], axis=3) for row in _both(OUTPUT, products_4x4)]
    return done, jnp.stack(rows_2, axis=2)

  _, strips = _by_strips(one, None, 4 * C, x_BxHxWxC)
  return jnp.moveaxis(strips, 0, 1).reshape(B, H, W, -1)


def _kept(x_BxHxWxC, kernel_3x3xCxF):
  # By the whole operation, of which remat's policies keep what comes out, and not the products of tiles.
  return winograd(x_BxHxWxC, kernel_3x3xCxF), (x_BxHxWxC, kernel_3x3xCxF)


def _gradients(kept, gradient_BxHxWxF):
  x_BxHxWxC, kernel_3x3xCxF = kept
  turned_3x3xFxC = kernel_3x3xCxF[::-1, ::-1].swapaxes(2, 3)
  return winograd(gradient_BxHxWxF, turned_3x3xFxC), _kernel_gradient(x_BxHxWxC, gradient_BxHxWxF)


winograd.defvjp(_kept, _gradients)
FEWER = {'winograd': 36 / 16, '_kernel_gradient': 36 / 16}  # programs, and what they divide multiplications by


@jax.jit
def _kernel_gradient(x_BxHxWxC, gradient_BxHxWxF):
  """(3, 3, C, F): transformed tiles of both, multiplied and summed, then transformed back."""
  C, F = x_BxHxWxC.shape[-1], gradient_BxHxWxF.shape[-1]

  def one(sums_4x4, x, gradient):
    B, h, W, _ = gradient.shape
    parts_2x2 = jnp.moveaxis(gradient.reshape(B, h // 2, 2, W // 2, 2, F), (2, 4), (0, 1))
    spread_4x4 = _both(tuple(zip(*OUTPUT)), parts_2x2)
    add = lambda total, tile, part: total + tile.T @ part.reshape(-1, F)
    return jax.tree.map(add, sums_4x4, _tiles(x), spread_4x4), None

  zeros = [[jnp.zeros((C, F), x_BxHxWxC.dtype) for _ in range(4)] for _ in range(4)]
  sums_4x4, _ = _by_strips(one, zeros, 4 * (C + F), x_BxHxWxC, gradient_BxHxWxF)
  return jnp.stack([jnp.stack(row) for row in _both(tuple(zip(*KERNEL)), sums_4x4)])


def _by_strips(one, done, channels, x_BxHxWxC, *others):
  """`one(done, strip of x with a border of one pixel, the others' strips)` -> (done, out): the last done, and all outs.

  channels: how many values of each pixel are to stay in the cache.
  """
  B, H, W, _ = x_BxHxWxC.shape
  images = B if isinstance(B, int) else 1  # exported, it may be a symbol
  rows = strip(H, images * W * channels * x_BxHxWxC.dtype.itemsize)
  x = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
  cut = lambda start: [jax.lax.dynamic_slice_in_dim(x, start, rows + 2, axis=1)] + [
      jax.lax.dynamic_slice_in_dim(other, start, rows, axis=1) for other in others]

  # The loop carries the strips that it computes next: were they cut where they are read, XLA would look for their
  # place at each element, and combine one at a time.
  def step(carry, start):
    done, out = one(carry[0], *carry[1])
    return (done, cut(start)), out

  (done, _), outs = jax.lax.scan(step, (done, cut(0)), jnp.arange(rows, H + rows, rows))  # nobody reads the last cut
  return done, outs


def strip(height, row_bytes):
  """An even number of rows that divides the height; their tiles fit into CACHE, where two rows do."""
  fitting = [rows for rows in range(2, height + 1, 2) if height % rows == 0 and rows * row_bytes <= CACHE]
  return max(fitting, default=2)


def _tiles(x):
  """4x4 arrays (B·h·w, C) from a strip with its border: tiles of 4x4 pixels, two apart, transformed."""
  B, h, w, C = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1, x.shape[3]
  x = x.reshape(B, h + 1, 2, w + 1, 2, C)
  at = lambda i, j: x[:, i // 2:i // 2 + h, i % 2, j // 2:j // 2 + w, j % 2]
  tiles_4x4 = _both(INPUT, [[at(i, j) for j in range(4)] for i in range(4)])
  return [[tile.reshape(-1, C) for tile in row] for row in tiles_4x4]


def _both(matrix, parts):
  """matrix · parts · matrix^T, of a matrix of arrays: rows of lists."""
  columns = [_combined(matrix, column) for column in zip(*[_combined(matrix, row) for row in parts])]
  return [list(row) for row in zip(*columns)]


def _combined(matrix, parts):
  """The rows of a matrix as sums of arrays."""
  sums = []
  for row in matrix:
    terms = [part if factor == 1 else factor * part for factor, part in zip(row, parts) if factor]
    sums.append(sum(terms[1:], terms[0]))
  return sums
