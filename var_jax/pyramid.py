"""The scales of a token pyramid, coarse to fine, and what follows from them. Pure NumPy: nothing of it is traced."""

import dataclasses
import functools

import numpy as np

from var_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pyramid:
  """Scales as (height, width) pairs, coarse to fine. L is the number of tokens in all, K the number of scales.

  markov: whether a generator's tokens see their own scale alone, whose input is the sum of all coarser ones.

  >>> Pyramid(((1, 1), (2, 2), (3, 3)))
  Pyramid(3 scales, 14 tokens: 1x1 2x2 3x3)
  >>> Pyramid.of((1, 2, 3)).slices[1]
  slice(1, 5, None)
  """

  scales: tuple[tuple[int, int], ...]
  markov: bool = False

  @classmethod
  def of(cls, scales):
    """From a sequence of sizes, each a number (square) or a (height, width) pair. Raises UserError on nonsense."""
    try:
      given = tuple((s, s) if np.ndim(s) == 0 else tuple(s) for s in scales)
      pairs = tuple((int(height), int(width)) for height, width in given)
      if pairs != given:
        raise ValueError('a part of a token')
    except (TypeError, ValueError, OverflowError):
      raise UserError(f'scales must be whole numbers or (height, width) pairs, not {scales!r}') from None
    if not pairs or min(min(pair) for pair in pairs) < 1:
      raise UserError(f'scales must be at least 1x1 and there must be one, not {scales!r}')
    if any(a[0] > b[0] or a[1] > b[1] for a, b in zip(pairs, pairs[1:])):
      raise UserError(f'scales must go from coarse to fine, not {scales!r}')
    return cls(pairs)

  def __len__(self):
    return len(self.scales)

  def __repr__(self):
    return f'Pyramid({len(self)} scales, {self.length} tokens: {" ".join(f"{h}x{w}" for h, w in self.scales)})'

  @property
  def last(self):
    """(height, width) of the finest token map, which is the latent's size."""
    return self.scales[-1]

  @functools.cached_property
  def sizes(self):
    """Tokens per scale, a tuple of K numbers."""
    return tuple(h * w for h, w in self.scales)

  @property
  def length(self):
    """L, the number of tokens of the whole pyramid."""
    return sum(self.sizes)

  @functools.cached_property
  def slices(self):
    """Where each scale's tokens lie in a (B, L, ...) array."""
    ends = np.cumsum(self.sizes).tolist()
    return tuple(slice(end - size, end) for end, size in zip(ends, self.sizes))

  @functools.cached_property
  def level_L(self):
    """(L,) int32: the scale that each token belongs to."""
    return np.repeat(np.arange(len(self), dtype=np.int32), self.sizes)

  @functools.cached_property
  def visible_LxL(self):
    """(L, L) bool: True where a query (row) may look: at tokens of its own and of coarser scales (paper, sec. 3.3)."""
    levels_Lx1, levels_1xL = self.level_L[:, None], self.level_L[None, :]
    return levels_Lx1 == levels_1xL if self.markov else levels_Lx1 >= levels_1xL

  def split(self, x_BxLxC):
    """Cuts (B, L, ...) into K arrays (B, h*w, ...)."""
    return [x_BxLxC[:, s] for s in self.slices]
