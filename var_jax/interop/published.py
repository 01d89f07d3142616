"""The published PyTorch checkpoints' names and layouts, and ours: one table for each network, read in both directions.

    names = generator_names(shapes)                  # shapes: our parameters, or their shapes
    params = from_published(tensors, names, shapes)  # {torch name: array} -> ours
    tensors = to_published(params, names)            # and back, bit for bit

Our blocks are stacked: block i of the published network is row i.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.errors import UserError
from var_jax.weights import match_shapes

# Tensors of a published checkpoint that follow from the architecture.
BUFFERS = re.compile(r'lvl_1L$|attn_bias_for_masking$|attn\.zero_k_bias$|ema_vocab_hit_SV$')


class Layout(NamedTuple):
  """How an array is turned from PyTorch's layout into ours, and back."""

  read: Callable
  write: Callable


class Place(NamedTuple):
  """Where a published tensor lives here. block: its row in the stacked blocks, None outside of them."""

  path: tuple
  layout: Layout
  block: int | None = None


SAME = Layout(lambda x: x, lambda x: x)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
DENSE = Layout(np.transpose, np.transpose)
THREE = Layout(lambda x: x.T.reshape(x.shape[1], 3, -1), lambda x: x.reshape(x.shape[0], -1).T)  # query, key, value
HEADS = Layout(np.ravel, lambda x: x.reshape(1, -1, 1, 1))
ONE_BEFORE = Layout(lambda x: x[0], lambda x: x[None])
TWO_BEFORE = Layout(lambda x: x[0, 0], lambda x: x[None, None])

_BLOCK = {
    'attn.scale_mul_1H11': Place(('attention', 'log_scale'), HEADS),
    'attn.q_bias': Place(('attention', 'q_bias'), SAME),
    'attn.v_bias': Place(('attention', 'v_bias'), SAME),
    'attn.mat_qkv.weight': Place(('attention', 'qkv', 'kernel'), THREE),
    'attn.proj.weight': Place(('attention', 'proj', 'kernel'), DENSE),
    'attn.proj.bias': Place(('attention', 'proj', 'bias'), SAME),
    'ffn.fc1.weight': Place(('fc1', 'kernel'), DENSE),
    'ffn.fc1.bias': Place(('fc1', 'bias'), SAME),
    'ffn.fc2.weight': Place(('fc2', 'kernel'), DENSE),
    'ffn.fc2.bias': Place(('fc2', 'bias'), SAME),
    'ada_lin.1.weight': Place(('adaln', 'kernel'), DENSE),
    'ada_lin.1.bias': Place(('adaln', 'bias'), SAME),
    'ada_gss': Place(('adaln',), TWO_BEFORE),
}

_OUTSIDE = {
    'pos_start': Place(('start',), ONE_BEFORE),
    'pos_1LC': Place(('position',), ONE_BEFORE),
    'word_embed.weight': Place(('word_embed', 'kernel'), DENSE),
    'word_embed.bias': Place(('word_embed', 'bias'), SAME),
    'class_emb.weight': Place(('class_embedding',), SAME),
    'lvl_embed.weight': Place(('level_embedding',), SAME),
    'shared_ada_lin.1.weight': Place(('shared', 'kernel'), DENSE),
    'shared_ada_lin.1.bias': Place(('shared', 'bias'), SAME),
    'head_nm.ada_lin.1.weight': Place(('head_adaln', 'kernel'), DENSE),
    'head_nm.ada_lin.1.bias': Place(('head_adaln', 'bias'), SAME),
    'head.weight': Place(('head', 'kernel'), DENSE),
    'head.bias': Place(('head', 'bias'), SAME),
}


def generator_names(params):
  """{torch name: Place} of the parameters of a `Generator`, or of their shapes."""
  names = {name: place for name, place in _OUTSIDE.items() if _has(params, place.path)}
  depth = params['blocks']['fc1']['bias'].shape[0]
  for i in range(depth):
    for name, (path, layout, _) in _BLOCK.items():
      if _has(params['blocks'], path):
        names[f'blocks.{i}.{name}'] = Place(('blocks', *path), layout, i)
  return names


def tokenizer_names(params, phi_each=False):
  """{torch name: Place} of the parameters of a `Tokenizer`, or of their shapes.

  phi_each: the phi layers belong to a scale each; the published code names those otherwise than shared ones.
  """
  names = {'quantize.embedding.weight': Place(('quantizer', 'codebook'), SAME)}
  phis = [name for name in params['quantizer'] if name.startswith('phi_')]
  for i in range(len(phis)):
    if phi_each:
      name = f'quantize.quant_resi.{i}'
    else:
      name = 'quantize.quant_resi.qresi' if len(phis) == 1 else f'quantize.quant_resi.qresi_ls.{i}'
    names |= _norm_or_conv(name, ('quantizer', f'phi_{i}'))
  for name in ('quant_conv', 'post_quant_conv'):
    names |= _norm_or_conv(name, (name,))
  for part in ('encoder', 'decoder'):
    leaves = jax.tree_util.tree_flatten_with_path(params[part])[0]
    for path in dict.fromkeys(tuple(p.key for p in path[:-1]) for path, _ in leaves):
      # Our norms wrap flax's module of the same name.
      path = path[:-1] if path[-1] == 'norm' and path[-2].startswith('norm') else path
      names |= _norm_or_conv(f'{part}.{_part_name(path)}', (part, *path))
  return names


def _norm_or_conv(name, path):
  """What a torch module's weight and bias are called here, and how they are laid out."""
  if '.norm' in name:
    return {f'{name}.weight': Place((*path, 'norm', 'scale'), SAME),
            f'{name}.bias': Place((*path, 'norm', 'bias'), SAME)}
  return {f'{name}.weight': Place((*path, 'kernel'), CONV), f'{name}.bias': Place((*path, 'bias'), SAME)}


def _part_name(path):
  """The torch module that a module of our encoder or decoder stands for: ('down_1_block_0', 'conv1') -> 'down.1...'."""
  name = '.'.join(path)
  name = re.sub(r'(down|up)_(\d+)_(block|attn)_(\d+)', r'\1.\2.\3.\4', name)
  name = re.sub(r'down_(\d+)_conv', r'down.\1.downsample.conv', name)
  name = re.sub(r'up_(\d+)_conv', r'up.\1.upsample.conv', name)
  name = name.replace('shortcut', 'nin_shortcut')
  return re.sub(r'(attn[._]\d+)\.proj$', r'\1.proj_out', name)


def _has(tree, path):
  for key in path:
    if not isinstance(tree, dict) or key not in tree:
      return False
    tree = tree[key]
  return not isinstance(tree, dict)


def _get(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def _set(tree, path, value):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def check(tensors, names, shapes, what):
  """Accounts for every tensor: UserError that names the missing, extra, misshapen and whole-numbered. Reads no values.

  shapes: of our parameters; what: the model's name in messages.
  """
  wanted = {}
  for name, (path, layout, block) in names.items():
    shape = _get(shapes, path).shape
    wanted[name] = layout.write(np.broadcast_to(np.float32(0), shape if block is None else shape[1:])).shape
  match_shapes({name: tensors[name] for name in tensors if not BUFFERS.search(name)}, wanted, what)
  for name in wanted:
    if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
      raise UserError(f'these are not the weights of {what}: {name} is of type {tensors[name].dtype}: save the model '
                      'in floating point, not quantized')


def from_published(tensors, names, shapes):
  """{torch name: array} that `check` found in order -> float32 parameters of the given shapes.

  UserError for numbers that are not finite.
  """
  params = jax.tree.map(lambda like: np.empty(like.shape, np.float32), shapes)
  for name, (path, layout, block) in names.items():
    tensor = np.asarray(tensors[name])
    if not np.isfinite(tensor).all():
      raise UserError(f'{name} holds NaN or infinite numbers: download the file again, or take an earlier checkpoint')
    _get(params, path)[... if block is None else block] = layout.read(tensor)
  return params


def to_published(params, names):
  """Parameters -> {torch name: float32 array}, without the buffers."""
  out = {}
  for name, (path, layout, block) in names.items():
    value = np.asarray(_get(params, path))
    out[name] = layout.write(value if block is None else value[block])
  return out


def generator_buffers(pyramid, width, depth):
  """The buffers of a published generator's checkpoint, {name: array}: levels, mask, and the bias that keys lack."""
  mask_LxL = np.where(pyramid.visible_LxL, np.float32(0), np.float32(-np.inf))
  zeros = {f'blocks.{i}.attn.zero_k_bias': np.zeros(width, np.float32) for i in range(depth)}
  return {'lvl_1L': pyramid.level_L[None].astype(np.int64), 'attn_bias_for_masking': mask_LxL[None, None], **zeros}


def tokenizer_buffers(pyramid, codes):
  """The buffer of a published tokenizer's checkpoint: how often each code was hit at each scale, not counted here."""
  return {'quantize.ema_vocab_hit_SV': np.zeros((len(pyramid), codes), np.float32)}
