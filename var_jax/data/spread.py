"""A fixed choice of a few images of a source, spread over its classes."""

import numpy as np


def spread(source, count):
  """Sorted indices of `count` images of a source, all of them if it has no more: the same in every process and run.

  Each class gives equally many, or all that it has, from even distances in its order. With fewer images than classes,
  evenly distant classes give one each. Tokens' labels are read for it, so that the same images are chosen as of the
  source of images. Of a source where a label costs a read of the image (tfds), evenly distant images are taken, which
  spreads over the classes of sorted data too.
  """
  if count >= len(source):
    return np.arange(len(source))
  if hasattr(source, 'labels'):
    labels_N = source.labels
  elif hasattr(source, 'read_labels'):
    labels_N = source.read_labels()
  else:
    return _even(len(source), count)
  _, class_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
  by_class = np.split(np.argsort(class_N, kind='stable'), np.cumsum(sizes)[:-1])
  chosen = [members[_even(len(members), share)] for members, share in zip(by_class, _shares(sizes, count))]
  return np.sort(np.concatenate(chosen))


def _shares(sizes, count):
  """How many images each class gives, `count` together and fewer than there are."""
  shares = np.zeros_like(sizes)
  while left := count - shares.sum():
    open_classes = np.flatnonzero(shares < sizes)
    if left < len(open_classes):
      shares[open_classes[_even(len(open_classes), left)]] += 1
    else:
      shares = np.minimum(sizes, shares + left // len(open_classes))
  return shares


def _even(many, count):
  """`count` <= many different indices below `many`: the middles of equal parts."""
  return (2 * np.arange(count) + 1) * many // (2 * max(count, 1))
