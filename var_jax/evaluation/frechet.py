"""The Fréchet distance between two Gaussians, the "FD" of FID (Heusel et al., arXiv 1706.08500, eq. 6)."""

import numpy as np

from var_jax.errors import UserError


def statistics(features_NxD, chunk=4096):
  """(mean (D,), covariance (D, D)) in float64, with N - 1 in the denominator as in the usual evaluators.

  Works through `chunk` rows at a time, so that 50,000 rows are never copied to float64 as a whole. Raises UserError
  for fewer than 2 rows and for values that are not finite.
  """
  features_NxD = np.asarray(features_NxD)
  count, width = features_NxD.shape
  if count < 2:
    raise UserError(f'a covariance of {count} image(s) is undefined: evaluate at least 2, better 10,000 and more')
  mu_D = features_NxD.mean(0, dtype=np.float64)
  if not np.isfinite(mu_D).all():
    raise UserError('the features hold NaN or infinite values: check the images and the weights of the feature network')
  sigma_DxD = np.zeros((width, width))
  for start in range(0, count, chunk):
    centred = features_NxD[start:start + chunk] - mu_D
    sigma_DxD += centred.T @ centred
  return mu_D, sigma_DxD / (count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
  """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float >= 0.

  The trace of the root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): nothing complex, and singular
  covariances (fewer images than features) need no eps on the diagonal. mu: (D,), sigma: (D, D).
  """
  mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
  if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
    raise UserError(f'statistics of {mu1.shape[0]} and {mu2.shape[0]} features cannot be compared: '
                    'compute both with the same feature network')
  root_trace = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
  distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
  return float(max(distance, 0.0))  # rounding can leave -1e-12 for equal statistics


def _factor(sigma_DxD):
  """F (D, rank) with F F^T = sigma. F = sigma^(1/2) up to a rotation, which singular values do not see."""
  values_D, vectors_DxD = np.linalg.eigh(sigma_DxD)
  positive = values_D > values_D[-1] * len(values_D) * np.finfo(np.float64).eps
  return vectors_DxD[:, positive] * np.sqrt(values_D[positive])
