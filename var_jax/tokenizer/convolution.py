"""3x3 convolutions on a CPU with 16 multiplications where 36 are written: Winograd's F(2x2, 3x3).

Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), sec. 4.1. Strip by strip, since
the transformed tiles are four times the image and are to stay in the cache. Differs from the direct sum by rounding.
"""

import jax
import jax.numpy as jnp

from var_jax import axes

LEAST_CHANNELS = 64  # with fewer, transforming costs more than it saves
CACHE = 2**23  # bytes of a strip's transformed tiles

INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def conv_general_dilated(x_BxHxWxC, kernel_3x3xCxF, strides, padding, **more):
  """`jax.lax.conv_general_dilated` for `nn.Conv`, of inference alone: what it computes on a CPU has slow gradients."""
  direct = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
  height, width = x_BxHxWxC.shape[1:3]
  suits = (kernel_3x3xCxF.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and height % 2 == width % 2 == 0
           and min(kernel_3x3xCxF.shape[2:]) >= LEAST_CHANNELS and x_BxHxWxC.dtype == jnp.float32)
  if not suits or axes.devices() > 1:
    return direct(x_BxHxWxC, kernel_3x3xCxF)
  return jax.lax.platform_dependent(x_BxHxWxC, kernel_3x3xCxF, cpu=winograd, default=direct)


def winograd(x_BxHxWxC, kernel_3x3xCxF):
  """(B, H, W, F): the convolution with zeros around the image; H and W are even."""
  B, H, W, C = x_BxHxWxC.shape
  rows = strip(H, 4 * W * C * x_BxHxWxC.dtype.itemsize)
  kernels_4x4 = [combined(KERNEL, row) for row in combined(KERNEL, kernel_3x3xCxF)]
  x = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
  cut = lambda start: jax.lax.dynamic_slice_in_dim(x, start, rows + 2, axis=1)
  # The loop carries the strip that it computes next: were it cut where it is read, XLA would look for its place at
  # each element, and combine one at a time.
  one = lambda strip, start: (cut(start), _strip(strip, kernels_4x4))
  _, strips = jax.lax.scan(one, cut(0), jnp.arange(rows, H + rows, rows))  # the last cut is read by nobody
  return jnp.moveaxis(strips, 0, 1).reshape(B, H, W, -1)


def strip(height, row_bytes):
  """An even number of rows that divides the height; their tiles fit into CACHE, where two rows do."""
  fitting = [rows for rows in range(2, height + 1, 2) if height % rows == 0 and rows * row_bytes <= CACHE]
  return max(fitting, default=2)


def combined(matrix, parts):
  """The rows of a matrix as sums of arrays."""
  sums = []
  for row in matrix:
    terms = [part if factor == 1 else factor * part for factor, part in zip(row, parts) if factor]
    sums.append(sum(terms[1:], terms[0]))
  return sums


def _strip(x, kernels_4x4):
  """(B, rows, W, F) from a strip with a border of one pixel: tiles of 4x4, two apart, give 2x2 each."""
  B, h, w, C = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1, x.shape[3]
  x = x.reshape(B, h + 1, 2, w + 1, 2, C)
  tiles_4 = combined(INPUT, [x[:, i // 2:i // 2 + h, i % 2] for i in range(4)])
  products = []
  for tile, kernels_4 in zip(tiles_4, kernels_4x4):
    columns_4 = combined(INPUT, [tile[:, :, j // 2:j // 2 + w, j % 2] for j in range(4)])
    products.append(combined(OUTPUT, [column.reshape(-1, C) @ kernel for column, kernel in zip(columns_4, kernels_4)]))
  rows_2 = [combined(OUTPUT, column) for column in zip(*products)]  # [output column][output row]
  pairs_2 = [jnp.stack([part.reshape(B, h, w, -1) for part in row], axis=3) for row in zip(*rows_2)]
  return jnp.stack(pairs_2, axis=2).reshape(B, 2 * h, 2 * w, -1)
