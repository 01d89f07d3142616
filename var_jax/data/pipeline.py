"""Source -> batches, with grain. The position in the data is the number of the batch and nothing else.

Element g of the endless stream of epochs is a function of (source, seed, g): which image, which crop, which flip. Batch
b is elements b*B to (b+1)*B - 1, and process p of n takes the p-th n-th of its rows. So a run resumes at any batch with
any number of processes and workers, and sees what it would have seen.
"""

import multiprocessing
import os
import signal
import sys
import threading

import grain
import numpy as np
from absl import flags

from var_jax import signals
from var_jax.data.images import UnreadableImage, fit
from var_jax.data.spread import spread
from var_jax.data.tokens import TokenSource
from var_jax.data.unreadable import Unreadable
from var_jax.errors import UserError

THREADS = 16, 64         # the fewest and most that are chosen by itself; a photo of 12 megapixels takes 36 MB in each
BYTES_AHEAD = 2**29      # of images that wait to become batches
MOST_IN_A_PIECE = 16     # images that a thread makes at a time: grain spends as long on a piece as on an image
PIECE_BYTES = 2**21
MAX_IN_A_ROW = 100       # unreadable images before giving up


def train_batches(source, *, batch_size, size, seed, start=0, enlarge=1.125, flip=False, workers=0, threads=0,
                  process_index=0, process_count=1, unreadable=None):
  """Endless Batches of {'image': (B_local, h, w, 3) uint8, 'label': (B_local,) int32}.

  Of a TokenSource, 'tokens': (B_local, L) int32 in place of 'image'.

  batch_size is global, size = (h, w); every image comes once per epoch, in an order and with crops (and flips) drawn
  from the seed, an int >= 0. `start` is the number of the first batch. workers: processes that prepare whole batches
  and hand them over in /dev/shm (containers often limit it); 0 uses threads of this process. threads: how many; 0 for
  one a core, but at least 16, since threads wait for storage too, and at most 64. The next readable image takes the
  place of an unreadable one. unreadable: an `Unreadable` that all batches of a run share, None for a new one.
  Raises UserError for a batch size that process_count does not divide, an empty source, a negative seed, and (from
  `next`) when too many files are unreadable.
  """
  if seed < 0:
    raise UserError(f'seed {seed} is negative: use 0 or more')
  local = _local_size(source, batch_size, process_index, process_count)
  order_seed, augment_seed = (int(part) for part in np.random.SeedSequence(seed).generate_state(2))
  elements = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()
  elements = elements.random_map(_TrainElement(source, size, enlarge, flip), seed=augment_seed)
  rows = _ProcessRows(elements, batch_size, local, process_index, start)
  return Batches(rows, source, local, size, enlarge, unreadable, workers, threads)


def eval_batches(source, *, batch_size, size, enlarge=1.125, limit=None, workers=0, threads=0, process_index=0,
                 process_count=1, unreadable=None):
  """Batches in source order with central crops, once through the source, or `limit` images as `spread` chooses them.

  As `train_batches`, with 'mask': (B_local,) float32, 0 for the rows that fill up the last batch and for unreadable
  images: both are black. A neighbour in an unreadable image's place would count twice in every mean.
  Every process gets the same number of batches.
  """
  local = _local_size(source, batch_size, process_index, process_count)
  chosen = np.arange(len(source)) if limit is None else spread(source, limit)
  elements = grain.MapDataset.range(-(-len(chosen) // batch_size) * batch_size)
  elements = elements.map(_EvalElement(source, size, enlarge, chosen))
  rows = _ProcessRows(elements, batch_size, local, process_index, 0)
  return Batches(rows, source, local, size, enlarge, unreadable, workers, threads)


def crop_batches(source, *, batch_size, size, seed, images, crops, enlarge=1.125, flip=False, workers=0, threads=0,
                 unreadable=None):
  """Batches of a range of a source's images in order, `crops` random ones of each; 0: the central one.

  A crop depends on (seed, image, number of the crop) alone. Batches are as those of `train_batches`; the last may be
  smaller.
  """
  many = max(crops, 1)
  elements = grain.MapDataset.range(len(source) * many)
  if crops:
    elements = elements.random_map(_TrainElement(source, size, enlarge, flip, crops), seed=seed)
  else:
    elements = elements.map(_CentralElement(source, size, enlarge))
  rows = elements[images.start * many:images.stop * many]
  return Batches(rows, source, batch_size, size, enlarge, unreadable, workers, threads, whole=False)


def _local_size(source, batch_size, process_index, process_count):
  """Rows of a batch that belong to one process."""
  if not len(source):
    raise UserError('the data source is empty: give one with images')
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'batch size {batch_size} cannot be shared by {process_count} processes: use a multiple of that')
  if not 0 <= process_index < process_count:
    raise UserError(f'process_index {process_index} is not one of {process_count} processes: count them from 0')
  return batch_size // process_count


class Batches:
  """Iterator over batches as dicts of NumPy arrays; `close` it to end its threads or worker processes.

  drawn: how many images this process has asked for. unreadable: the files that could not be read, see `Unreadable`.
  """

  def __init__(self, rows, source, local, size, enlarge, unreadable, workers, threads, whole=True):
    self.drawn = 0
    self.unreadable = Unreadable() if unreadable is None else unreadable
    self._source, self._size, self._enlarge = source, size, enlarge
    self._iterator = iter(_parallel(rows, local, whole, size[0] * size[1] * 3, workers, threads))

  def __iter__(self):
    return self

  def __next__(self):
    try:
      batch = next(self._iterator)
      self._count(batch.pop('skipped'), batch.get('mask'))
    except StopIteration:
      raise
    except BaseException:  # Ctrl-C too: what is left running would delay the exit
      self.close()
      raise
    return {name: np.asarray(array) for name, array in batch.items()}  # not grain's subclass for shared memory

  @property
  def skipped(self):
    """How many different files could not be read."""
    return len(self.unreadable)

  def close(self):
    """Ends threads and processes; no further batch can be drawn. May be called twice."""
    self._iterator.close()

  def _count(self, skipped, mask):
    """Takes in one batch's unreadable images (source index + 1, or 0)."""
    bad = skipped > 0
    self.drawn += len(skipped) if mask is None else int(np.sum((mask > 0) | bad))
    self.unreadable.add(self._source, skipped[bad] - 1, self._reason)

  def _reason(self, index):
    """Why an image is bad: read here once more, for it may have been met in another process."""
    try:
      _prepare(self._source, index, self._size, self._enlarge)
    except UnreadableImage as error:
      return str(error)
    return 'which can be read now: check the storage'


def _parallel(rows, count, whole, image_bytes, workers, threads):
  """Grain iterator dataset that makes batches ahead, in order: in `workers` processes, or in threads for 0.

  Threads make some images at a time, a piece of a batch, so that as many work on a large batch as on a small one.
  Memory is that of two batches of images (BYTES_AHEAD at most, but a piece for each thread), of the batch itself, and
  of what each thread decodes. whole: leaves out a last batch with fewer rows.
  """
  if workers:
    # A worker makes one batch after the other and keeps two ready; batches are dealt to the workers in turn.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain asks absl for its options; outside of a command nobody has parsed any
    dealt = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    batches = rows.batch(count, drop_remainder=whole)
    return batches.to_iter_dataset(read).mp_prefetch(dealt, worker_init_fn=_start_worker)
  threads = threads or min(max(os.cpu_count() or 1, THREADS[0]), THREADS[1])
  piece = max(n for n in range(1, min(count, MOST_IN_A_PIECE) + 1) if count % n == 0 and n * image_bytes <= PIECE_BYTES
              or n == 1)
  ahead = max(threads, min(2 * count, BYTES_AHEAD // image_bytes) // piece)
  pieces = rows.batch(piece, drop_remainder=whole, batch_fn=_stacked)
  pieces = pieces.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
  return pieces.batch(count // piece, drop_remainder=whole, batch_fn=_joined)


def _stacked(elements):
  return {name: np.stack([element[name] for element in elements]) for name in elements[0]}


def _joined(pieces):
  return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _start_worker(index, count):
  """In a worker process: leaves signals to the main process, and ends with it even if that one is killed."""
  del index, count
  for number in signals.NUMBERS:  # Slurm and a terminal send them to all
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class _ProcessRows(grain.MapDataset):
  """The elements of one process: local row index -> index in the global stream, from batch `start` on."""

  def __init__(self, parent, batch_size, local, process_index, start):
    super().__init__(parent)
    self._batch_size, self._local = batch_size, local
    self._offset = start * batch_size + process_index * local
    self._length = (min(len(parent), sys.maxsize) // batch_size - start) * local

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._local)
    return self._parent[self._offset + batch * self._batch_size + row]

  def __str__(self):
    return f'_ProcessRows({self._local} of {self._batch_size} from {self._offset})'


class _TrainElement(grain.transforms.RandomMap):
  """Source index, times crops -> element of a training batch, cropped and flipped by the element's own generator."""

  def __init__(self, source, size, enlarge, flip, crops=1):
    self._source, self._size, self._enlarge, self._flip, self._crops = source, size, enlarge, flip, crops

  def random_map(self, index, rng):
    return _readable(self._source, index // self._crops, self._size, self._enlarge, rng, self._flip)


class _CentralElement(grain.transforms.Map):
  """Source index -> element with a central crop."""

  def __init__(self, source, size, enlarge):
    self._source, self._size, self._enlarge = source, size, enlarge

  def map(self, index):
    return _readable(self._source, index, self._size, self._enlarge)


class _EvalElement(grain.transforms.Map):
  """Position -> element of an evaluation batch: that of chosen[position], and behind the last ones that are masked."""

  def __init__(self, source, size, enlarge, chosen):
    self._source, self._size, self._enlarge, self._chosen = source, size, enlarge, chosen

  def map(self, position):
    index, mask = int(self._chosen[position % len(self._chosen)]), np.float32(position < len(self._chosen))
    masked = {'image': np.zeros((*self._size, 3), np.uint8), 'label': np.int32(0), 'mask': np.float32(0)}
    if not mask and not isinstance(self._source, TokenSource):
      return masked | {'skipped': np.int32(0)}
    try:
      return _element(self._source, index, self._size, self._enlarge) | {'mask': mask}
    except UnreadableImage:
      return masked | {'skipped': np.int32(index + 1)}


def _readable(source, index, size, enlarge, rng=None, flip=False):
  """Element of source[index], or of the next readable image; 'skipped' is then index + 1, else 0."""
  first = None
  for step in range(min(MAX_IN_A_ROW, len(source))):
    try:
      element = _element(source, (index + step) % len(source), size, enlarge, rng, flip)
    except UnreadableImage as error:
      first = first or error
    else:
      return element | {'skipped': np.int32(index + 1 if step else 0)}
  raise UserError(f'{step + 1} images in a row are unreadable from number {index} on; the first: {first}')


def _element(source, index, size, enlarge, rng=None, flip=False):
  """What a batch has of source[index]; of a TokenSource the tokens of a random crop, or of the first one.

  Raises UnreadableImage.
  """
  if isinstance(source, TokenSource):
    tokens_CxL, label = source[index]
    crop = rng.integers(len(tokens_CxL)) if rng else 0
    return {'tokens': tokens_CxL[crop], 'label': np.int32(label), 'skipped': np.int32(0)}
  image, label = _prepare(source, index, size, enlarge, rng, flip)
  return {'image': image, 'label': np.int32(label), 'skipped': np.int32(0)}


def _prepare(source, index, size, enlarge, rng=None, flip=False):
  """((h, w, 3) uint8, label) of source[index]. Raises UnreadableImage."""
  image, label = source[index]
  crop = fit(image, size, enlarge=enlarge, rng=rng, flip=flip)
  return (crop if crop.size == image.size else crop.copy()), label  # a view would keep all that it is cut from
