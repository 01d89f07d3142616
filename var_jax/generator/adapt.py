"""A generator's parameters for another number of classes or another pyramid: where fine-tuning begins.

The rule, for whatever differs:
- classes: every class starts as "no class" was; that itself stays.
- level embeddings: interpolated linearly over the scales' ranks k/(K-1).
- positions: each scale takes the map of the old scale with the nearest number of tokens, resized bilinearly.
"""

import numpy as np
from flax.traverse_util import flatten_dict

from var_jax.errors import UserError
from var_jax.tokenizer import resize
from var_jax.weights import match_shapes

GENERATOR_FIELDS = ('depth', 'width', 'heads', 'mlp_ratio', 'normalize_qk', 'shared_adaln', 'codes', 'channels')
TOKENIZER_FIELDS = ('codes', 'channels', 'ch', 'ch_mult', 'res_blocks', 'phi_layers')


def check_alike(old, new, fields):
  """Raises UserError that names the first of some fields in which two modules differ."""
  for field in fields:
    if getattr(old, field) != getattr(new, field):
      raise UserError(f'start_from has {field} {getattr(old, field)}, this run {getattr(new, field)}: begin with a '
                      'model of the same architecture')


def adapted(params, old, new, shapes):
  """Parameters of the Generator `old` as those of the Generator `new`. shapes: of the new parameters.

  Raises UserError that names what cannot be adapted: width, depth, codebook.
  """
  params = dict(params)
  if old.classes != new.classes:
    none_D = np.asarray(params['class_embedding'])[-1]
    params['class_embedding'] = np.tile(none_D, (new.classes + 1, 1))
  if old.pyramid.scales != new.pyramid.scales:
    params['level_embedding'] = _levels(np.asarray(params['level_embedding']), len(new.pyramid))
    params['position'] = _positions(np.asarray(params['position']), old.pyramid, new.pyramid)
    params['start'] = _resized(np.asarray(params['start']), old.pyramid.scales[0], new.pyramid.scales[0])
  check(params, shapes, 'this generator')
  return params


def check(params, shapes, what):
  """Raises UserError unless parameters have the given shapes."""
  shapes = {name: like.shape for name, like in flatten_dict(shapes, sep='/').items()}
  match_shapes(flatten_dict(params, sep='/'), shapes, what, hint='begin with a model of the same architecture')


def _levels(level_KxD, scales):
  old, new = np.linspace(0, 1, len(level_KxD)), np.linspace(0, 1, scales)
  return np.stack([np.interp(new, old, column) for column in level_KxD.T], axis=1).astype(np.float32)


def _positions(position_LxD, old, new):
  maps = []
  for size in new.scales:
    nearest = min(range(len(old)), key=lambda k: abs(old.sizes[k] - size[0] * size[1]))
    maps.append(_resized(position_LxD[old.slices[nearest]], old.scales[nearest], size))
  return np.concatenate(maps)


def _resized(map_NxD, old, new):
  """(h*w, D) of an old (h, w) as that of a new one."""
  resized = resize.bilinear(map_NxD.reshape(1, *old, -1), new)
  return np.asarray(resized).reshape(-1, map_NxD.shape[-1])
