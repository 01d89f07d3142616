"""The Fréchet distance between two Gaussians, the "FD" of FID (Heusel et al., arXiv 1706.08500, eq. 6)."""

import numpy as np

from var_jax.errors import UserError


class Moments:
  """Mean and covariance of features that come batch by batch; float64, about the first batch's mean, hence stable."""

  def __init__(self):
    self.count, self._shift_D = 0, None

  def add(self, features_BxD):
    """Takes in a batch of rows."""
    features_BxD = np.asarray(features_BxD, np.float64)
    if self._shift_D is None:
      self._shift_D = features_BxD.mean(0)
      self._sum_D, self._outer_DxD = np.zeros_like(self._shift_D), np.zeros((len(self._shift_D),) * 2)
    centred = features_BxD - self._shift_D
    self.count += len(centred)
    self._sum_D += centred.sum(0)
    self._outer_DxD += centred.T @ centred

  def result(self):
    """(mean (D,), covariance (D, D)), with N - 1 in the denominator as in the usual evaluators.

    Raises UserError for fewer than 2 rows and for values that are not finite.
    """
    if self.count < 2:
      raise UserError(f'a covariance of {self.count} image(s) is undefined: evaluate at least 2, better 10,000')
    if not np.isfinite(self._sum_D).all():
      raise UserError('the features hold NaN or infinite values: check the weights of the feature network')
    mean_D = self._sum_D / self.count
    return self._shift_D + mean_D, (self._outer_DxD - self.count * np.outer(mean_D, mean_D)) / (self.count - 1)


def statistics(features_NxD, chunk=4096):
  """(mean (D,), covariance (D, D)) of features at hand, see `Moments`."""
  moments = Moments()
  for start in range(0, len(features_NxD), chunk):
    moments.add(features_NxD[start:start + chunk])
  return moments.result()


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
