"""How well a tokenizer gives back held-out images, and how much of its codebook each scale uses."""

import numpy as np

from var_jax.data import pipeline
from var_jax.data.sources import open_source
from var_jax.tokenizer.losses import codebook_use


def figures(model, config, batch_size=64):
  """{name: number}: mean PSNR in dB, mean absolute error in 0..255, and per scale the share of codes in use.

  See `codebook_use`, here over all validation images.
  """
  source = open_source(config.data.source, config.data.path, 'validation')
  pyramid = model.tokenizer.pyramid
  counts_KxV, psnr, error = np.zeros((len(pyramid), model.tokenizer.codes)), [], []
  batches = pipeline.eval_batches(
      source, batch_size=batch_size, size=model.tokenizer.image_size, enlarge=config.data.enlarge)
  for batch in batches:
    count = int(batch['mask'].sum())
    images = batch['image'][:count]
    tokens = model.encode(images, batch_size=batch_size)
    drawn = model.decode(tokens, batch_size=batch_size).astype(np.float32)
    off = drawn - (images + 1) * 127.5
    psnr.extend(10 * np.log10(255**2 / np.maximum((off**2).mean((1, 2, 3)), 1e-4)))
    error.extend(np.abs(off).mean((1, 2, 3)))
    for k, part in enumerate(pyramid.split(tokens)):
      counts_KxV[k] += np.bincount(part.ravel(), minlength=model.tokenizer.codes)
  batches.close()
  result = {'images': len(psnr), 'psnr': float(np.mean(psnr)), 'absolute_error': float(np.mean(error))}
  for (height, width), counts_V in zip(pyramid.scales, counts_KxV):
    size = f'{height}x{width}'
    result[f'usage_{size}'], result[f'perplexity_{size}'] = codebook_use(counts_V)
  return result
