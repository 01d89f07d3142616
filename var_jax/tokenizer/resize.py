"""Resizing of latents, equal to PyTorch's `area` and `bicubic` interpolation, as two small matrix products."""

import functools

import jax.numpy as jnp
import numpy as np

CUBIC = -0.75  # PyTorch's coefficient; Catmull-Rom and jax.image use -0.5


@functools.cache
def area_matrix(old, new):
  """(new, old) averaging weights of adaptive pooling: bin i covers floor(i*old/new) up to ceil((i+1)*old/new)."""
  weights = np.zeros((new, old), np.float32)
  for i in range(new):
    start, end = i * old // new, -(-(i + 1) * old // new)
    weights[i, start:end] = 1 / (end - start)
  return weights


@functools.cache
def bicubic_matrix(old, new):
  """(new, old) weights of cubic convolution with half-pixel centres, clamped borders and no antialiasing."""

  def kernel(t):
    t = np.abs(t)
    near = ((CUBIC + 2) * t - (CUBIC + 3)) * t * t + 1
    far = ((CUBIC * t - 5 * CUBIC) * t + 8 * CUBIC) * t - 4 * CUBIC
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

  centres = (np.arange(new) + 0.5) * old / new - 0.5
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    index = np.floor(centres).astype(int) + tap
    np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1)), kernel(centres - index))
  return weights.astype(np.float32)


def _resize(x_BxHxWxC, size, matrix):
  height, width = x_BxHxWxC.shape[1:3]
  if (height, width) == tuple(size):
    return x_BxHxWxC
  rows, columns = matrix(height, size[0]), matrix(width, size[1])
  return jnp.einsum('bhwc,yh,xw->byxc', x_BxHxWxC, rows, columns, precision='highest')


def area(x_BxHxWxC, size):
  """(B, H, W, C) averaged down to `size` (height, width), uneven bins included."""
  return _resize(x_BxHxWxC, size, area_matrix)


def bicubic(x_BxHxWxC, size):
  """(B, H, W, C) brought up to `size` (height, width)."""
  return _resize(x_BxHxWxC, size, bicubic_matrix)


@functools.cache
def bilinear_matrix(old, new):
  """(new, old) weights of linear interpolation with half-pixel centres, clamped borders and no antialiasing."""
  centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  low = np.floor(centres).astype(int)
  weights = np.zeros((new, old), np.float32)
  np.add.at(weights, (np.arange(new), low), 1 - (centres - low))
  np.add.at(weights, (np.arange(new), np.minimum(low + 1, old - 1)), centres - low)
  return weights


def bilinear(x_BxHxWxC, size):
  """(B, H, W, C) interpolated at `size` (height, width); for keep masks."""
  return _resize(x_BxHxWxC, size, bilinear_matrix)
