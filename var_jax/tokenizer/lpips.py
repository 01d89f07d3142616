"""LPIPS: how different two images look, measured in the features of VGG-16 (Zhang et al., arXiv 1801.03924, eq. 1).

    params = lpips.load('vgg16-397923af.pth', 'lpips_vgg.pth')     # torchvision's VGG-16 and the linear heads, v0.1
    loss = lpips.distance(params, x_BxHxWx3, y_BxHxWx3).mean()     # images in [-1, 1]

The network is fixed and a pure function of `params`, so a loss can be differentiated through it.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.errors import UserError
from var_jax.weights import inside, match_shapes, read_tensors

# Convolutions as (index in torchvision's `features`, channels out); each row ends where a linear head reads the
# activation, and every row but the first starts with a 2x2 max pooling.
STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
# The "scaling layer" of LPIPS: ImageNet's channel means and deviations for images in [-1, 1].
SHIFT = np.array([-.030, -.088, -.188], np.float32)
SCALE = np.array([.458, .448, .450], np.float32)
EPSILON = 1e-10
FILES = ("FILE,FILE: torchvision's vgg16-397923af.pth (download.pytorch.org/models) and the heads, "
         'lpips/weights/v0.1/vgg.pth of `pip download --no-deps lpips`; or one file that holds both')
TELLING = ('features.0.weight', 'net.slice1.0.weight', 'lin0.model.1.weight', 'lins.0.model.1.weight')


def distance(params, x_BxHxWx3, y_BxHxWx3, *, precision='highest'):
  """LPIPS of B image pairs in [-1, 1] with H, W >= 16: (B,) float32, 0 for equal images. See `per_layer`."""
  return per_layer(params, x_BxHxWx3, y_BxHxWx3, precision=precision).sum(0)


def per_layer(params, x_BxHxWx3, y_BxHxWx3, *, precision='highest'):
  """What each of the five layers adds to the distance: (5, B) float32.

  `precision` is that of the convolutions; 'highest' is true float32 on accelerators too.
  """
  # A pass for each, so that only the one whose gradient is wanted is gone through backwards.
  passes = (_features(params, image.astype(jnp.float32), precision) for image in (x_BxHxWx3, y_BxHxWx3))
  layers = []
  for head_C, x_BxHxWxC, y_BxHxWxC in zip(params['heads'], *passes, strict=True):
    difference = _unit_length(x_BxHxWxC) - _unit_length(y_BxHxWxC)
    layers.append(jnp.mean(difference ** 2 @ head_C, axis=(1, 2)))
  return jnp.stack(layers)


def load(*paths):
  """params from one weight file or several that make it up (VGG-16 here, the heads there). Raises UserError."""
  tensors = {}
  try:
    for path in paths:
      tensors |= inside(read_tensors(path), TELLING, path)[0]
    return from_torch(tensors)
  except UserError as error:
    raise UserError(f'{error}; LPIPS takes {FILES}') from error


def shapes():
  """The shapes of params, without any weights."""
  tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in _shapes().items()}
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), from_torch(tensors))


def from_torch(tensors):
  """params {'convs': ((kernel, bias), ...), 'heads': (weights_C, ...)} from tensors in PyTorch's names and layouts.

  Accepts torchvision's names beside those of the lpips package, `linN.model.1.weight` (alone) and `lins.N...`,
  `net.sliceK.N...` (its whole state). Raises UserError that names each missing, unexpected or misshapen tensor.
  """
  tensors = {_canonical(name): value for name, value in tensors.items() if not _is_unused(name)}
  hint = "give torchvision's vgg16 weights together with the VGG heads of LPIPS v0.1"
  tensors = match_shapes(tensors, _shapes(), 'LPIPS with VGG-16', hint)
  convs = [(tensors[f'features.{i}.weight'], tensors[f'features.{i}.bias']) for stage in STAGES for i, _ in stage]
  return {
      'convs': tuple((_float32(kernel).transpose(2, 3, 1, 0), _float32(bias)) for kernel, bias in convs),
      'heads': tuple(_float32(tensors[f'lin{k}.model.1.weight'])[0, :, 0, 0] for k in range(len(STAGES))),
  }


def _shapes():
  """{name: shape} of the tensors that make up the network."""
  shapes, channels = {}, 3
  for k, stage in enumerate(STAGES):
    for index, features in stage:
      shapes[f'features.{index}.weight'] = (features, channels, 3, 3)
      shapes[f'features.{index}.bias'] = (features,)
      channels = features
    shapes[f'lin{k}.model.1.weight'] = (1, channels, 1, 1)
  return shapes


def _canonical(name):
  name = re.sub(r'^net\.slice\d\.', 'features.', name)
  return re.sub(r'^lins?\.(\d)\.', r'lin\1.', name)


def _is_unused(name):
  return name.startswith(('classifier.', 'scaling_layer.'))


def _float32(array):
  return np.asarray(array, np.float32)


def _features(params, x_BxHxWx3, precision):
  """Yields the activation after the last convolution of each stage, (B, H/2^k, W/2^k, C)."""
  x, convs = (x_BxHxWx3 - SHIFT) / SCALE, iter(params['convs'])
  for k, stage in enumerate(STAGES):
    if k:
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
    for _ in stage:
      x = jax.nn.relu(_conv(x, *next(convs), precision))
    yield x


def _conv(x_BxHxWxC, kernel, bias, precision):
  x = jax.lax.conv_general_dilated(x_BxHxWxC, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
                                   precision=precision)
  return x + bias


def _unit_length(x_BxHxWxC):
  square = jnp.sum(x_BxHxWxC ** 2, axis=-1, keepdims=True)
  # Where every channel is off the slope of sqrt is infinite, and infinity times zero would spoil the whole gradient.
  length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return x_BxHxWxC / (length + EPSILON)
