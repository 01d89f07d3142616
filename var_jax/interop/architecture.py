"""From the names and shapes in a published checkpoint to a config: the architecture is nowhere else written down."""

import re

from var_jax import configs
from var_jax.errors import UserError
from var_jax.pyramid import Pyramid

PUBLISHED_SCALES = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)
KNOWN_LENGTHS = {Pyramid.of(scales).length: scales for scales in PUBLISHED_SCALES}  # 680, 2240, 9451 tokens
HEAD_SIZE = 64  # of every published generator
NOT_IN_FILES = {'groups': 32, 'phi_ratio': 0.5, 'normalized_lookup': False}  # of tokenizers, as published


def scales_of(generator, patch_nums=None):
  """The scales of a generator's tensors: those of its token count where it is a published one, else patch_nums.

  UserError when they are unknown, or when patch_nums do not have as many tokens or scales as the tensors.
  """
  length, levels = _shape(generator, 'pos_1LC')[1], _shape(generator, 'lvl_embed.weight')[0]
  if not patch_nums and length not in KNOWN_LENGTHS:
    raise UserError(f'{length} tokens in {levels} scales are no published pyramid: name the scales, coarse to fine, '
                    'such as --patch_nums=1,2,3,4')
  pyramid = Pyramid.of(patch_nums or KNOWN_LENGTHS[length])
  if (pyramid.length, len(pyramid)) != (length, levels):
    raise UserError(f'--patch_nums are {len(pyramid)} scales with {pyramid.length} tokens, but the generator has '
                    f'{levels} with {length}: name the scales that it was trained with')
  return pyramid.scales


def tokenizer_config(tensors, scales, settings=None):
  """(locked config, whether each scale has a phi of its own) of a tokenizer's tensors {torch name: array}.

  settings: of NOT_IN_FILES, where they are not as published.
  """
  codes, channels = _shape(tensors, 'quantize.embedding.weight')
  ch = _shape(tensors, 'encoder.conv_in.weight')[0]
  levels = _count(tensors, r'encoder\.down\.(\d+)\.')
  outs = [_shape(tensors, f'encoder.down.{i}.block.0.conv2.weight')[0] for i in range(levels)]
  own, shared = (_count(tensors, rf'quantize\.quant_resi\.{kind}(\d+)\.') for kind in ('', r'qresi_ls\.'))
  single = int('quantize.quant_resi.qresi.weight' in tensors)
  config = configs.tokenizer()
  config.model.update(
      scales=tuple(scales), codes=codes, channels=channels, ch=ch, ch_mult=tuple(out // ch for out in outs),
      res_blocks=_count(tensors, r'encoder\.down\.0\.block\.(\d+)\.'), phi_layers=own or shared or single,
      **NOT_IN_FILES | (settings or {}))
  stride = 2 ** (levels - 1)
  config.update(image_size=tuple(side * stride for side in Pyramid.of(scales).last), epochs=1.0, ema=0.0)
  config.data.source = 'tfds'
  return config.lock(), bool(own)


def generator_config(tensors, heads=0):
  """Locked config of a generator's tensors {torch name: array}. heads: needed where no tensor tells."""
  width = _shape(tensors, 'word_embed.weight')[0]
  depth = _count(tensors, r'blocks\.(\d+)\.')
  normalize_qk = 'blocks.0.attn.scale_mul_1H11' in tensors
  if normalize_qk:
    found = _shape(tensors, 'blocks.0.attn.scale_mul_1H11')[1]
    if heads not in (0, found):
      raise UserError(f'the file has {found} heads, --heads says {heads}: leave it out')
    heads = found
  elif not heads:
    if width % HEAD_SIZE:
      raise UserError(f'the number of heads cannot be told from a width of {width}: name it by --heads=N')
    heads = width // HEAD_SIZE
  config = configs.generator(max(depth, 1))
  config.model.update(
      width=width, heads=heads, mlp_ratio=_shape(tensors, 'blocks.0.ffn.fc1.weight')[0] / width,
      classes=_shape(tensors, 'class_emb.weight')[0] - 1, normalize_qk=normalize_qk,
      shared_adaln='shared_ada_lin.1.weight' in tensors)
  config.epochs = 1.0
  config.data.source = 'tfds'
  return config.lock()


def _shape(tensors, name):
  if name not in tensors:
    raise UserError(f'the file lacks the tensor {name}: is it the published checkpoint of this kind of network?')
  return tuple(int(side) for side in tensors[name].shape)


def _count(tensors, pattern):
  """How many numbers from 0 on occur in tensors' names at the pattern's group."""
  found = [int(match[1]) for match in map(re.compile(pattern).match, tensors) if match]
  return max(found, default=-1) + 1
