"""Inception Score, and improved precision and recall, as the evaluator of the published figures computes them."""

import hashlib

import numpy as np

from var_jax.errors import UserError


def inception_score(logits_NxC, split=5000):
  """exp of the mean divergence of each image's class distribution from the split's (Salimans et al., 1606.03498).

  Mean over splits of so many images. logits: of the classifier, without its bias for the published figures. Splits
  are drawn by the images' own numbers: in the order of the images, which may be that of their classes, each split
  could hold a few classes alone and would score low.
  """
  logits_NxC = np.asarray(logits_NxC)
  digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in logits_NxC]
  logits_NxC, scores = logits_NxC[sorted(range(len(digests)), key=digests.__getitem__)], []
  for start in range(0, len(logits_NxC), split):
    logits = np.asarray(logits_NxC[start:start + split], np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probs = np.exp(log_probs)
    scores.append(np.exp(np.mean(np.sum(probs * (log_probs - np.log(probs.mean(axis=0))), axis=1))))
  return float(np.mean(scores))


def precision_recall(reference_NxD, samples_MxD, nearest=3, block=2048):
  """(precision, recall) of Kynkäänniemi et al. (1904.06991): the share of one set within the other's manifold.

  A set's manifold is the union of balls around its rows that reach to their k-th nearest neighbour. Squared distances
  in float64, `block` rows at a time. UserError for sets of at most `nearest` rows.
  """
  for name, rows in (('reference', reference_NxD), ('sample', samples_MxD)):
    if len(rows) <= nearest:
      raise UserError(f'{len(rows)} {name} images are too few for precision and recall: give more than {nearest}')
  centre_D = np.mean(reference_NxD, axis=0, dtype=np.float64)  # smaller numbers, smaller rounding
  reference, samples = (np.asarray(rows, np.float64) - centre_D for rows in (reference_NxD, samples_MxD))
  precision = _covered(reference, _radii(reference, nearest, block), samples, block)
  return precision, _covered(samples, _radii(samples, nearest, block), reference, block)


def _squared_distances(a_NxD, b_MxD):
  return (a_NxD**2).sum(1)[:, None] + (b_MxD**2).sum(1) - 2 * a_NxD @ b_MxD.T


def _radii(rows_NxD, nearest, block):
  """(N,) squared distances to the k-th nearest other row."""
  return np.concatenate([
      np.partition(_squared_distances(rows_NxD[start:start + block], rows_NxD), nearest, axis=1)[:, nearest]
      for start in range(0, len(rows_NxD), block)])


def _covered(centres_NxD, radii_N, points_MxD, block):
  """Share of the points that lie in at least one ball."""
  inside = [(_squared_distances(points_MxD[start:start + block], centres_NxD) <= radii_N).any(axis=1)
            for start in range(0, len(points_MxD), block)]
  return float(np.mean(np.concatenate(inside)))
