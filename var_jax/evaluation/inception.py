"""The Inception network of FID (the 2015 TensorFlow graph, in pytorch-fid's names), as a pure function of its weights.

    params = inception.load('pt_inception-2015-12-05-6726825d.pth')
    pool_Bx2048 = jax.jit(inception.features)(params, images_BxHxWx3)['pool']

It is not the classifier of the paper (Szegedy et al., arXiv 1512.00567): average pooling leaves the border out of its
mean, the last block pools by maximum, and there are 1008 outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.weights import inside, match_shapes, read_tensors

SIZE = 299
OUTPUTS = 1008
EPSILON = 1e-3  # of the batch norms
FEATURES = 2048
SPATIAL_CHANNELS = 7  # as many as sFID reads, to stay near the 2048 of the pooled features: 17 * 17 * 7 = 2023


class Conv(NamedTuple):
  """Convolution without bias, batch norm, ReLU. `name` is that of PyTorch's module within its block."""
  name: str
  features: int
  kernel: tuple = (1, 1)
  stride: int = 1
  padding: str = 'SAME'


class Pool(NamedTuple):
  """A 3x3 pooling, 'max' or 'average'; with stride 1 it keeps the size."""
  kind: str
  stride: int = 1


# A branch is a list of layers, a block a list of branches that read the same input and are concatenated. A block may
# stand in a branch as well: the last blocks split their branches again.


def _block_a(pool_features):
  return [
      [Conv('branch1x1', 64)],
      [Conv('branch5x5_1', 48), Conv('branch5x5_2', 64, (5, 5))],
      [Conv('branch3x3dbl_1', 64), Conv('branch3x3dbl_2', 96, (3, 3)), Conv('branch3x3dbl_3', 96, (3, 3))],
      [Pool('average'), Conv('branch_pool', pool_features)],
  ]


def _block_b():
  return [
      [Conv('branch3x3', 384, (3, 3), 2, 'VALID')],
      [Conv('branch3x3dbl_1', 64), Conv('branch3x3dbl_2', 96, (3, 3)), Conv('branch3x3dbl_3', 96, (3, 3), 2, 'VALID')],
      [Pool('max', 2)],
  ]


def _block_c(inner):
  return [
      [Conv('branch1x1', 192)],
      [Conv('branch7x7_1', inner), Conv('branch7x7_2', inner, (1, 7)), Conv('branch7x7_3', 192, (7, 1))],
      [Conv('branch7x7dbl_1', inner), Conv('branch7x7dbl_2', inner, (7, 1)), Conv('branch7x7dbl_3', inner, (1, 7)),
       Conv('branch7x7dbl_4', inner, (7, 1)), Conv('branch7x7dbl_5', 192, (1, 7))],
      [Pool('average'), Conv('branch_pool', 192)],
  ]


def _block_d():
  return [
      [Conv('branch3x3_1', 192), Conv('branch3x3_2', 320, (3, 3), 2, 'VALID')],
      [Conv('branch7x7x3_1', 192), Conv('branch7x7x3_2', 192, (1, 7)), Conv('branch7x7x3_3', 192, (7, 1)),
       Conv('branch7x7x3_4', 192, (3, 3), 2, 'VALID')],
      [Pool('max', 2)],
  ]


def _block_e(pooling):
  return [
      [Conv('branch1x1', 320)],
      [Conv('branch3x3_1', 384), [[Conv('branch3x3_2a', 384, (1, 3))], [Conv('branch3x3_2b', 384, (3, 1))]]],
      [Conv('branch3x3dbl_1', 448), Conv('branch3x3dbl_2', 384, (3, 3)),
       [[Conv('branch3x3dbl_3a', 384, (1, 3))], [Conv('branch3x3dbl_3b', 384, (3, 1))]]],
      [Pool(pooling), Conv('branch_pool', 192)],
  ]


def _stem():
  return [
      ('Conv2d_1a_3x3', Conv('', 32, (3, 3), 2, 'VALID')),
      ('Conv2d_2a_3x3', Conv('', 32, (3, 3), 1, 'VALID')),
      ('Conv2d_2b_3x3', Conv('', 64, (3, 3))),
      ('block0', Pool('max', 2)),
      ('Conv2d_3b_1x1', Conv('', 80)),
      ('Conv2d_4a_3x3', Conv('', 192, (3, 3), 1, 'VALID')),
      ('block1', Pool('max', 2)),
  ]


# (name, layer or block) in order. TensorFlow's graph calls the blocks mixed, mixed_1, ... mixed_10.
NETWORK = _stem() + [
    ('Mixed_5b', _block_a(32)), ('Mixed_5c', _block_a(64)), ('Mixed_5d', _block_a(64)), ('Mixed_6a', _block_b()),
    ('Mixed_6b', _block_c(128)), ('Mixed_6c', _block_c(160)), ('Mixed_6d', _block_c(160)), ('Mixed_6e', _block_c(192)),
    ('Mixed_7a', _block_d()), ('Mixed_7b', _block_e('average')), ('Mixed_7c', _block_e('max')),
]


def features(params, images_BxHxWx3, resize='half_pixel', *, precision='highest'):
  """What the evaluators read from images with values 0..255 (uint8): a dict of float32 arrays.

  - pool (B, 2048): FID, precision and recall.
  - logits (B, 1008); logits_unbiased is without the last bias, as the evaluator of the published Inception Scores
    (guided-diffusion) takes its softmax.
  - spatial (B, 17*17*7): sFID (arXiv 2103.03841). It is `mixed_6/conv:0` of the TensorFlow graph, whose mixed_6 is
    Mixed_6d here, and whose op `conv` is the ReLU after the 1x1 branch's batch norm: the block's first channels.
  - block0_mean (B, 64), block1_mean (B, 192), block2_mean (B, 768): spatial means after the two poolings of the stem
    and after Mixed_6e.

  resize: 'half_pixel' as pytorch-fid, 'tf1' (pixel corners coincide, (x - 128) / 128) as the evaluator of the
  published FIDs; figures of one are not comparable with the other's. Jit with `resize` static. `precision` is that
  of the convolutions; 'highest' is true float32 on accelerators too.
  """
  x, taps = prepare(images_BxHxWx3, resize), {}
  for name, layer in NETWORK:
    x = taps[name] = _apply(params, name, layer, x, precision)
  pool_Bx2048 = x.mean((1, 2))
  unbiased_Bx1008 = jnp.matmul(pool_Bx2048, params['fc']['kernel'], precision=precision)
  return {
      'pool': pool_Bx2048,
      'logits': unbiased_Bx1008 + params['fc']['bias'],
      'logits_unbiased': unbiased_Bx1008,
      'spatial': taps['Mixed_6d'][..., :SPATIAL_CHANNELS].reshape(len(x), -1),
      'block0_mean': taps['block0'].mean((1, 2)),
      'block1_mean': taps['block1'].mean((1, 2)),
      'block2_mean': taps['Mixed_6e'].mean((1, 2)),
  }


def prepare(images_BxHxWx3, resize):
  """Images with values 0..255, bilinearly resized (no antialias) and scaled to about [-1, 1]: (B, 299, 299, 3)."""
  x = jnp.asarray(images_BxHxWx3).astype(jnp.float32)
  rows, columns = (resize_matrix(size, SIZE, resize) for size in x.shape[1:3])
  x = jnp.einsum('ph,bhwc->bpwc', rows, x, precision='highest')
  x = jnp.einsum('qw,bpwc->bpqc', columns, x, precision='highest')
  return (x - 128) / 128 if resize == 'tf1' else 2 * (x / 255) - 1


def resize_matrix(source, target, resize):
  """Weights (target, source) float32 of bilinear interpolation along one axis, clamped at the border.

  'half_pixel': position (i + 1/2) * source / target - 1/2, as in PyTorch with align_corners=False and TensorFlow 2;
  'tf1': i * source / target, as in TensorFlow 1. Raises ValueError for another name.
  """
  if resize not in ('half_pixel', 'tf1'):
    raise ValueError(f"resize is {resize!r}, must be 'half_pixel' or 'tf1'")
  offset = 0.5 if resize == 'half_pixel' else 0.0
  position = np.maximum((np.arange(target) + offset) * (source / target) - offset, 0)
  low = np.minimum(position.astype(int), source - 1)
  high = np.minimum(low + 1, source - 1)
  fraction = position - low
  matrix = np.zeros((target, source), np.float32)
  np.add.at(matrix, (np.arange(target), low), 1 - fraction)
  np.add.at(matrix, (np.arange(target), high), fraction)
  return matrix


def load(path):
  """params from a weight file, see `from_torch`. Raises UserError."""
  return from_torch(inside(read_tensors(path), ('Conv2d_1a_3x3.conv.weight',), path)[0])


def from_torch(tensors):
  """params {convolution: {'kernel' (h, w, in, out), 'bias' (out,)}, 'fc': ...} from pytorch-fid's names and layouts.

  Batch norms are folded into the convolutions before them. Raises UserError that names each missing, unexpected or
  misshapen tensor.
  """
  tensors = {name: value for name, value in tensors.items() if not name.endswith('.num_batches_tracked')}
  convs = dict(_convs())
  hint = 'give pt_inception-2015-12-05-6726825d.pth of pytorch-fid; the classifier of torchvision is another network'
  tensors = match_shapes(tensors, _shapes(convs), 'the Inception network of FID', hint)
  params = {name: _folded(tensors, name) for name in convs}
  params['fc'] = {'kernel': np.asarray(tensors['fc.weight'], np.float32).T,
                  'bias': np.asarray(tensors['fc.bias'], np.float32)}
  return params


def _folded(tensors, name):
  kernel, gamma, beta, mean, variance = (np.asarray(tensors[f'{name}.{part}'], np.float64) for part in (
      'conv.weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var'))
  scale = gamma / np.sqrt(variance + EPSILON)
  return {'kernel': (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32),
          'bias': (beta - mean * scale).astype(np.float32)}


def _convs():
  """Yields (full name, weight shape in PyTorch's layout) of every convolution."""
  channels = 3
  for name, layer in NETWORK:
    found = []
    channels = _collect(name, layer, channels, found)
    yield from found


def _collect(prefix, layer, channels, found):
  """Appends the convolutions within a layer that reads `channels`; returns how many it writes."""
  if isinstance(layer, Pool):
    return channels
  if isinstance(layer, Conv):
    found.append((_full_name(prefix, layer), (layer.features, channels, *layer.kernel)))
    return layer.features
  written = 0
  for branch in layer:
    inner = channels
    for step in branch:
      inner = _collect(prefix, step, inner, found)
    written += inner
  return written


def _shapes(convs):
  """{name: shape} of every tensor that makes up the network."""
  shapes = {}
  for name, shape in convs.items():
    shapes[f'{name}.conv.weight'] = shape
    shapes |= {f'{name}.bn.{part}': shape[:1] for part in ('weight', 'bias', 'running_mean', 'running_var')}
  return shapes | {'fc.weight': (OUTPUTS, FEATURES), 'fc.bias': (OUTPUTS,)}


def _full_name(prefix, conv):
  return f'{prefix}.{conv.name}' if conv.name else prefix


def _apply(params, prefix, layer, x_BxHxWxC, precision):
  """A convolution, a pooling, or a block of branches."""
  if isinstance(layer, Conv):
    return _conv(x_BxHxWxC, params[_full_name(prefix, layer)], layer, precision)
  if isinstance(layer, Pool):
    return _pool(x_BxHxWxC, layer)
  outputs = []
  for branch in layer:
    y = x_BxHxWxC
    for step in branch:
      y = _apply(params, prefix, step, y, precision)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=-1)


def _conv(x_BxHxWxC, weights, conv, precision):
  y = jax.lax.conv_general_dilated(x_BxHxWxC, weights['kernel'], (conv.stride, conv.stride), conv.padding,
                                   dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=precision)
  return jax.nn.relu(y + weights['bias'])


def _pool(x_BxHxWxC, pool):
  window, strides = (1, 3, 3, 1), (1, pool.stride, pool.stride, 1)
  padding = 'SAME' if pool.stride == 1 else 'VALID'
  if pool.kind == 'max':
    return jax.lax.reduce_window(x_BxHxWxC, -jnp.inf, jax.lax.max, window, strides, padding)
  total = jax.lax.reduce_window(x_BxHxWxC, 0.0, jax.lax.add, window, strides, padding)
  ones_1xHxWx1 = np.ones((1, *x_BxHxWxC.shape[1:3], 1), np.float32)
  return total / jax.lax.reduce_window(ones_1xHxWx1, 0.0, jax.lax.add, window, strides, padding)
