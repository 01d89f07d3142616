"""The published networks in PyTorch, as functions of a checkpoint's tensors: what benchmark_torch.py times.

As the published code computes them, step by step, with PyTorch's own fused attention; tensors have the published names
and layouts (`var_jax.interop.published`). Images and latents are (B, C, H, W), tokens x_BxLxD.
"""

import math

import torch
import torch.nn.functional as F

from var_jax.tokenizer.quantizer import phi_index


def linear(w, name, x):
  return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))


def conv(w, name, x, **how):
  weight = w[f'{name}.weight']
  return F.conv2d(x, weight, w[f'{name}.bias'], **{'padding': weight.shape[-1] // 2} | how)


def norm(w, name, x):
  return F.group_norm(x, 32, w[f'{name}.weight'], w[f'{name}.bias'], 1e-6)


def res_block(w, name, x):
  h = conv(w, f'{name}.conv1', F.silu(norm(w, f'{name}.norm1', x)))
  h = conv(w, f'{name}.conv2', F.silu(norm(w, f'{name}.norm2', h)))
  return (conv(w, f'{name}.nin_shortcut', x) if f'{name}.nin_shortcut.weight' in w else x) + h


def attn_block(w, name, x):
  B, C, H, W = x.shape
  q, k, v = conv(w, f'{name}.qkv', norm(w, f'{name}.norm', x)).reshape(B, 3, C, H * W).transpose(2, 3).unbind(1)
  out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, C, H, W)
  return x + conv(w, f'{name}.proj_out', out)


def blocks(w, name, x):
  """All blocks of a level, each with its attention where it has one."""
  i = 0
  while f'{name}.block.{i}.conv1.weight' in w:
    x = res_block(w, f'{name}.block.{i}', x)
    x = attn_block(w, f'{name}.attn.{i}', x) if f'{name}.attn.{i}.qkv.weight' in w else x
    i += 1
  return x


def middle(w, name, x):
  return res_block(w, f'{name}.block_2', attn_block(w, f'{name}.attn_1', res_block(w, f'{name}.block_1', x)))


def levels(w, part):
  return len({name.split('.')[2] for name in w if name.startswith(f'{part}.')})


def to_latent(w, image):
  x = conv(w, 'encoder.conv_in', image)
  for level in range(levels(w, 'encoder.down')):
    x = blocks(w, f'encoder.down.{level}', x)
    if f'encoder.down.{level}.downsample.conv.weight' in w:
      x = conv(w, f'encoder.down.{level}.downsample.conv', F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
  x = middle(w, 'encoder.mid', x)
  return conv(w, 'quant_conv', conv(w, 'encoder.conv_out', F.silu(norm(w, 'encoder.norm_out', x))))


def to_image(w, latent):
  x = middle(w, 'decoder.mid', conv(w, 'decoder.conv_in', conv(w, 'post_quant_conv', latent)))
  for level in reversed(range(levels(w, 'decoder.up'))):
    x = blocks(w, f'decoder.up.{level}', x)
    if level:
      x = conv(w, f'decoder.up.{level}.upsample.conv', F.interpolate(x, scale_factor=2, mode='nearest'))
  return conv(w, 'decoder.conv_out', F.silu(norm(w, 'decoder.norm_out', x))).clamp(-1, 1)


def expand(w, tokens_BxL, k, pyramid):
  """One scale's share of the latent, with the four phis that scales share."""
  x = w['quantize.embedding.weight'][tokens_BxL].transpose(1, 2).unflatten(2, pyramid.scales[k])
  x = F.interpolate(x, pyramid.last, mode='bicubic') if k < len(pyramid) - 1 else x
  return 0.5 * x + 0.5 * conv(w, f'quantize.quant_resi.qresi_ls.{phi_index(k, len(pyramid), 4)}', x)


def shrink(latent, k, pyramid):
  return F.interpolate(latent, pyramid.scales[k], mode='area') if k < len(pyramid) - 1 else latent


def encode(w, image, pyramid):
  """Tokens of each scale."""
  codebook, left, tokens = w['quantize.embedding.weight'], to_latent(w, image), []
  for k in range(len(pyramid)):
    x_NxC = shrink(left, k, pyramid).permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
    distances = torch.addmm(x_NxC.square().sum(1, keepdim=True) + codebook.square().sum(1), x_NxC, codebook.T, alpha=-2)
    tokens.append(distances.argmin(1).reshape(len(image), -1))
    left = left - expand(w, tokens[k], k, pyramid)
  return tokens


def decode(w, tokens, pyramid):
  return to_image(w, sum(expand(w, tokens_BxL, k, pyramid) for k, tokens_BxL in enumerate(tokens)))


def attention(w, name, x_BxLxD, mask, cache):
  """cache: a list of keys and values of the coarser scales, to which these are added; None when training."""
  B, L, D = x_BxLxD.shape
  bias = torch.cat([w[f'{name}.q_bias'], torch.zeros(D), w[f'{name}.v_bias']])
  heads = w[f'{name}.scale_mul_1H11'].shape[1]
  qkv = F.linear(x_BxLxD, w[f'{name}.mat_qkv.weight'], bias).view(B, L, 3, heads, -1).permute(2, 0, 3, 1, 4)
  q, k, v = qkv.unbind(0)
  q = F.normalize(q, dim=-1) * w[f'{name}.scale_mul_1H11'].clamp_max(math.log(100)).exp()
  k = F.normalize(k, dim=-1)
  if cache is not None:
    k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache, (k, v))) if cache else (k, v)
    cache[:] = k, v
  out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
  return linear(w, f'{name}.proj', out.transpose(1, 2).reshape(B, L, D))


def transformer(w, x_BxLxD, labels_B, mask=None, caches=None):
  """Logits of tokens. caches: a list for each block, see `attention`."""
  D, i = x_BxLxD.shape[-1], 0
  plain = lambda x: F.layer_norm(x, (D,), eps=1e-6)
  silu = F.silu(w['class_emb.weight'][labels_B])
  while f'blocks.{i}.ffn.fc1.weight' in w:
    chunks = linear(w, f'blocks.{i}.ada_lin.1', silu).view(-1, 1, 6, D)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = chunks.unbind(2)
    h = plain(x_BxLxD).mul(scale1.add(1)).add_(shift1)
    x_BxLxD = x_BxLxD + attention(w, f'blocks.{i}.attn', h, mask, caches and caches[i]).mul_(gamma1)
    h = plain(x_BxLxD).mul(scale2.add(1)).add_(shift2)
    h = linear(w, f'blocks.{i}.ffn.fc2', F.gelu(linear(w, f'blocks.{i}.ffn.fc1', h), approximate='tanh'))
    x_BxLxD, i = x_BxLxD + h.mul(gamma2), i + 1
  scale, shift = linear(w, 'head_nm.ada_lin.1', silu).view(-1, 1, 2, D).unbind(2)
  return linear(w, 'head', plain(x_BxLxD).mul(scale.add(1)).add_(shift))


def place(w, pyramid, tokens=slice(None)):
  return (w['lvl_embed.weight'][torch.from_numpy(pyramid.level_L)] + w['pos_1LC'][0])[tokens]


def first(w, labels_B):
  return w['class_emb.weight'][labels_B][:, None] + w['pos_start']


def logits(w, labels_B, teacher_BxMxC, pyramid):
  """(B, L, V) with teacher forcing."""
  mask_LxL = torch.from_numpy(pyramid.visible_LxL).log()
  x = torch.cat([first(w, labels_B), linear(w, 'word_embed', teacher_BxMxC)], 1) + place(w, pyramid)
  return transformer(w, x, labels_B, mask_LxL)


def likely(logits_BxlxV, top_k, top_p):
  """Logits with -inf for all but the top_k, and then top_p of what is left, by sorting as the published code does."""
  if top_k:
    least = logits_BxlxV.topk(top_k, largest=True, sorted=False).values.amin(-1, keepdim=True)
    logits_BxlxV = logits_BxlxV.masked_fill(logits_BxlxV < least, -torch.inf)
  if top_p:
    ascending, index = logits_BxlxV.sort(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    logits_BxlxV = logits_BxlxV.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
  return logits_BxlxV


def sample(w, labels_B, pyramid, cfg, top_k, top_p):
  """(guided logits of each scale, images), with keys and values kept."""
  no_class = torch.full_like(labels_B, len(w['class_emb.weight']) - 1)
  labels_2B, total, found = torch.cat([labels_B, no_class]), 0, []
  x = first(w, labels_2B)
  caches = [[] for name in w if name.endswith('.ffn.fc1.weight')]
  for k in range(len(pyramid)):
    t = cfg * k / (len(pyramid) - 1)
    with_class, without = transformer(w, x + place(w, pyramid, pyramid.slices[k]), labels_2B, None, caches).chunk(2)
    found.append((1 + t) * with_class - t * without)
    weights = likely(found[k], top_k, top_p).softmax(-1)
    tokens_Bxl = torch.multinomial(weights.flatten(0, 1), 1).view(weights.shape[:2])
    total = total + expand(w, tokens_Bxl, k, pyramid)
    if k + 1 < len(pyramid):
      x = linear(w, 'word_embed', shrink(total, k + 1, pyramid).flatten(2).transpose(1, 2)).repeat(2, 1, 1)
  return found, to_image(w, total)
