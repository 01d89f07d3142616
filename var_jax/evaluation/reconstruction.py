"""How well a tokenizer gives back held-out images, and how much of its codebook each scale uses."""

import jax
import numpy as np

from var_jax.data import pipeline
from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.evaluation import fid
from var_jax.tokenizer import lpips
from var_jax.tokenizer.losses import codebook_use


def figures(model, config, *, batch_size=64, extractor=None, lpips_params=None):
  """{name: number} over all validation images, cropped as in training's evaluation.

  Mean PSNR in dB, SSIM and absolute error in 0..255; per scale the share of codes in use and their perplexity; with
  an extractor (see `fid`) the Fréchet distance of reconstructions from images; with lpips_params the mean LPIPS.
  """
  source = open_source(config.data.source, config.data.path, 'validation')
  pyramid, rows = model.tokenizer.pyramid, {}
  counts_KxV = np.zeros((len(pyramid), model.tokenizer.codes))
  gathered = [fid.Gathering(extractor, len(source)) for _ in range(2)] if extractor else []
  distance = jax.jit(lpips.distance)
  batches = pipeline.eval_batches(
      source, batch_size=batch_size, size=model.tokenizer.image_size, enlarge=config.data.enlarge)
  for batch in batches:
    images = batch['image'][batch['mask'] > 0]
    count = len(images)
    if not count:  # none of them could be read
      continue
    tokens = model.encode(images, batch_size=batch_size)
    drawn = model.decode(tokens, batch_size=batch_size)
    off = drawn.astype(np.float64) - images
    rows.setdefault('psnr', []).extend(10 * np.log10(255**2 / np.maximum((off**2).mean((1, 2, 3)), 1e-4)))
    rows.setdefault('ssim', []).extend(ssim(images, drawn))
    rows.setdefault('absolute_error', []).extend(np.abs(off).mean((1, 2, 3)))
    if lpips_params is not None:
      x, y = (np.resize(a, (batch_size, *a.shape[1:])) / np.float32(127.5) - 1 for a in (images, drawn))
      rows.setdefault('lpips', []).extend(np.asarray(distance(lpips_params, x, y))[:count])
    for part, kept in zip((images, drawn), gathered):
      kept.add(part)
    for k, part in enumerate(pyramid.split(tokens)):
      counts_KxV[k] += np.bincount(part.ravel(), minlength=model.tokenizer.codes)
  batches.close()
  if not rows:
    raise UserError(f'none of the {len(source)} held-out images can be read; the first: {batches.unreadable.first}')
  result = {'images': len(rows['psnr'])} | {name: float(np.mean(values)) for name, values in rows.items()}
  if gathered:
    result['rfid'] = fid.compare(*(kept.result() for kept in gathered[::-1]))['fid']
  for (height, width), counts_V in zip(pyramid.scales, counts_KxV):
    size = f'{height}x{width}'
    result[f'usage_{size}'], result[f'perplexity_{size}'] = codebook_use(counts_V)
  return result


def ssim(x_BxHxWx3, y_BxHxWx3):
  """(B,) structural similarity of uint8 images (Wang et al. 2004): Gaussian window of 11 pixels, mean over channels.

  Images smaller than the window take one of the largest odd size that fits.
  """
  x, y = (np.asarray(a, np.float64) for a in (x_BxHxWx3, y_BxHxWx3))
  rows, columns = (_blur_matrix(size) for size in x.shape[1:3])
  blur = lambda a: np.einsum('ph,qw,bhwc->bpqc', rows, columns, a, optimize=True)
  mean_x, mean_y = blur(x), blur(y)
  var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
  c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2
  value = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
  return value.mean((1, 2, 3))


def _blur_matrix(size):
  """(positions, size): a Gaussian window, sigma 1.5, at every place where it lies within the image."""
  width = min(11, size - (size + 1) % 2)
  window = np.exp(-0.5 * ((np.arange(width) - width // 2) / 1.5)**2)
  places = size - width + 1
  matrix = np.zeros((places, size))
  for i in range(places):
    matrix[i, i:i + width] = window / window.sum()
  return matrix
