"""The published PyTorch checkpoints' names and layouts, and ours: one table for each network.

`import_*` turn {name: array} into parameters; a missing, extra or misshapen tensor is a UserError that names it.
"""

import re

import jax
import numpy as np

from var_jax.errors import UserError

BUFFERS = re.compile(r'lvl_1L$|attn_bias_for_masking$|attn\.zero_k_bias$|ema_vocab_hit_SV$')


def _conv(x):
  return x.transpose(2, 3, 1, 0)  # OIHW -> HWIO


def _dense(x):
  return x.T


def _same(x):
  return x


def _norm_and_conv(name, path):
  """What a torch module's weight and bias are called here, and how the weight is laid out."""
  if '.norm' in name or name.startswith('norm'):
    return {f'{name}.weight': ((*path, 'norm', 'scale'), _same), f'{name}.bias': ((*path, 'norm', 'bias'), _same)}
  return {f'{name}.weight': ((*path, 'kernel'), _conv), f'{name}.bias': ((*path, 'bias'), _same)}


def _part_name(path):
  """The torch module that a module of our encoder or decoder stands for: ('down_1_block_0', 'conv1') -> 'down.1...'."""
  name = '.'.join(path)
  name = re.sub(r'(down|up)_(\d+)_(block|attn)_(\d+)', r'\1.\2.\3.\4', name)
  name = re.sub(r'down_(\d+)_conv', r'down.\1.downsample.conv', name)
  name = re.sub(r'up_(\d+)_conv', r'up.\1.upsample.conv', name)
  name = name.replace('shortcut', 'nin_shortcut')
  return re.sub(r'(attn[._]\d+)\.proj$', r'\1.proj_out', name)


def _phi_name(i, phi_layers, scales):
  if phi_layers == 1:
    return 'quantize.quant_resi.qresi'
  return f'quantize.quant_resi.{i}' if phi_layers == scales and phi_layers != 4 else f'quantize.quant_resi.qresi_ls.{i}'


def tokenizer_names(params, phi_layers, scales, phi_each=None):
  """{torch name: (path in params, layout)} for a tokenizer's parameters. phi_each: one phi per scale (K may be 4)."""
  names = {'quantize.embedding.weight': (('quantizer', 'codebook'), _same)}
  for i in range(phi_layers):
    name = f'quantize.quant_resi.{i}' if phi_each else _phi_name(i, phi_layers, scales)
    names |= _norm_and_conv(name, ('quantizer', f'phi_{i}'))
  for name in ('quant_conv', 'post_quant_conv'):
    names |= _norm_and_conv(name, (name,))
  for part in ('encoder', 'decoder'):
    leaves = jax.tree_util.tree_flatten_with_path(params[part])[0]
    modules = dict.fromkeys(tuple(p.key for p in path[:-1]) for path, _ in leaves)
    for path in modules:
      path = path[:-1] if path[-1] == 'norm' and path[-2].startswith('norm') or path[-2:] == ('norm', 'norm') else path
      names |= _norm_and_conv(f'{part}.{_part_name(path)}', (part, *path))
  return names


_BLOCK = {
    'attn.scale_mul_1H11': (('attention', 'log_scale'), np.ravel),
    'attn.q_bias': (('attention', 'q_bias'), _same),
    'attn.v_bias': (('attention', 'v_bias'), _same),
    'attn.mat_qkv.weight': (('attention', 'qkv', 'kernel'), _dense),
    'attn.proj.weight': (('attention', 'proj', 'kernel'), _dense),
    'attn.proj.bias': (('attention', 'proj', 'bias'), _same),
    'ffn.fc1.weight': (('fc1', 'kernel'), _dense),
    'ffn.fc1.bias': (('fc1', 'bias'), _same),
    'ffn.fc2.weight': (('fc2', 'kernel'), _dense),
    'ffn.fc2.bias': (('fc2', 'bias'), _same),
    'ada_lin.1.weight': (('adaln', 'kernel'), _dense),
    'ada_lin.1.bias': (('adaln', 'bias'), _same),
    'ada_gss': (('adaln',), lambda x: x[0, 0]),
}

_OUTSIDE = {
    'pos_start': (('start',), lambda x: x[0]),
    'pos_1LC': (('position',), lambda x: x[0]),
    'word_embed.weight': (('word_embed', 'kernel'), _dense),
    'word_embed.bias': (('word_embed', 'bias'), _same),
    'class_emb.weight': (('class_embedding',), _same),
    'lvl_embed.weight': (('level_embedding',), _same),
    'shared_ada_lin.1.weight': (('shared', 'kernel'), _dense),
    'shared_ada_lin.1.bias': (('shared', 'bias'), _same),
    'head_nm.ada_lin.1.weight': (('head_adaln', 'kernel'), _dense),
    'head_nm.ada_lin.1.bias': (('head_adaln', 'bias'), _same),
    'head.weight': (('head', 'kernel'), _dense),
    'head.bias': (('head', 'bias'), _same),
}


def _get(tree, path):
  for key in path:
    if not isinstance(tree, dict) or key not in tree:
      return None
    tree = tree[key]
  return None if isinstance(tree, dict) else tree


def _set(tree, path, value):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _take(tensors, name, layout, shape):
  if name not in tensors:
    raise UserError(f'the checkpoint lacks the tensor {name}: is it the file for this network?')
  value = layout(np.asarray(tensors[name]))
  if value.shape != tuple(shape):
    raise UserError(f'tensor {name} has shape {tensors[name].shape}, which does not fit the expected {tuple(shape)}')
  return value


def _refuse_extra(tensors, used):
  extra = sorted(name for name in tensors if name not in used and not BUFFERS.search(name))
  if extra:
    raise UserError(f'the checkpoint holds {len(extra)} tensors that the network has no place for: {extra[0]}, …')


def import_tokenizer(tensors, params, *, phi_layers, scales, phi_each=None):
  """{torch name: array} -> parameters of `Tokenizer`. params: its parameters or their shapes, for checking."""
  names, out = tokenizer_names(params, phi_layers, scales, phi_each), {}
  for name, (path, layout) in names.items():
    _set(out, path, _take(tensors, name, layout, _get(params, path).shape))
  _refuse_extra(tensors, names)
  return out


def import_generator(tensors, params, *, depth):
  """{torch name: array} -> parameters of `Generator`, the blocks stacked. params: its parameters or their shapes."""
  out, used = {}, set()
  for name, (path, layout) in _OUTSIDE.items():
    if (like := _get(params, path)) is not None:
      _set(out, path, _take(tensors, name, layout, like.shape))
      used.add(name)
  for name, (path, layout) in _BLOCK.items():
    if (like := _get(params, ('blocks', *path))) is not None:
      each = [f'blocks.{i}.{name}' for i in range(depth)]
      _set(out, ('blocks', *path), np.stack([_take(tensors, n, layout, like.shape[1:]) for n in each]))
      used.update(each)
  _refuse_extra(tensors, used)
  return out
