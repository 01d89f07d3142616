"""The files of a data set that could not be read: each counts once, whatever split, epoch or resume."""

from var_jax.errors import UserError

MAX_SHARE = 0.01  # of the images of a set, training and held-out part together; one is always tolerated


class Unreadable:
  """Which images could not be read. All batches of a run share one, so that files are counted and not encounters."""

  def __init__(self):
    self._seen = {}  # (id of a source, index) -> the source, which keeps its id from being given again
    self.first = None

  def __len__(self):
    return len(self._seen)

  def add(self, source, indices, reason):
    """Counts images of a source. reason: index -> what is wrong. UserError for too many of `source.total`."""
    for index in map(int, indices):
      self._seen[id(source), index] = source
      if self.first is None:
        self.first = f'number {index}, {reason(index)}'
    if len(self) > max(1, MAX_SHARE * source.total):
      raise UserError(f'{len(self)} images are unreadable, more than {MAX_SHARE:.0%} of the {source.total} of the '
                      f'whole set; the first: {self.first}')
