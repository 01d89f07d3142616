"""Batches: every image once an epoch, whatever the processes and workers; unreadable images."""

import threading
import time

import numpy as np
import pytest
from tiny_images import Broken, assert_same, noise, numbered, take

from var_jax.data.arrays import ArraySource
from var_jax.data.pipeline import eval_batches, train_batches
from var_jax.data.sources import open_source
from var_jax.data.unreadable import Unreadable
from var_jax.errors import UserError

KW = dict(batch_size=6, size=(4, 4), seed=3)


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_every_image_comes_once_per_epoch(processes):
  source = numbered(15)  # epochs end within batches: 5 batches are 2 epochs
  shares = [take(train_batches(source, **KW, process_index=p, process_count=processes), 5) for p in range(processes)]
  order = np.concatenate([share[b]['label'] for b in range(5) for share in shares])
  for epoch in (order[:15], order[15:]):
    assert sorted(epoch.tolist()) == list(range(15))
  assert (order[:15] != order[15:]).any()
  other = np.concatenate([batch['label'] for batch in take(train_batches(source, **KW | {'seed': 4}), 5)])
  assert (order != other).any()


def test_processes_together_see_what_one_sees():
  source = open_source('digits')
  whole = take(train_batches(source, **KW, flip=True), 4)
  for n in (2, 3):
    parts = [take(train_batches(source, **KW, flip=True, process_index=p, process_count=n), 4) for p in range(n)]
    joined = [{name: np.concatenate([part[b][name] for part in parts]) for name in whole[0]} for b in range(4)]
    assert_same(joined, whole)


def test_batches_are_bytes_and_int32():
  batch, = take(train_batches(open_source('digits'), **KW), 1)
  assert batch.keys() == {'image', 'label'}
  assert batch['image'].shape == (6, 4, 4, 3) and batch['image'].dtype == np.uint8
  assert batch['label'].shape == (6,) and batch['label'].dtype == np.int32
  assert batch['image'].min() < 64 < 192 < batch['image'].max()
  assert type(batch['image']) is np.ndarray


def test_start_skips_exactly_that_many_batches():
  source = open_source('digits')
  straight = take(train_batches(source, **KW, flip=True), 7)
  assert_same(take(train_batches(source, **KW, flip=True, start=4), 3), straight[4:])
  far = 10**7
  a, b = (take(train_batches(numbered(15), **KW, start=start), 2) for start in (far, far + 1))
  assert_same(a[1:], b[:1])


def test_crops_depend_on_seed_and_position_alone():
  source = numbered(1, size=4)
  source = ArraySource(noise(1, 12, 12, 3), source.labels, source.class_names)  # one image: only the crops differ
  first, again = (take(train_batches(source, batch_size=8, size=(6, 6), seed=0, enlarge=2), 2) for _ in range(2))
  assert_same(first, again)
  crops = {image.tobytes() for batch in first for image in batch['image']}
  assert len(crops) > 8
  other = take(train_batches(source, batch_size=8, size=(6, 6), seed=1, enlarge=2), 2)
  assert (other[0]['image'] != first[0]['image']).any()


def test_workers_change_nothing():
  source = open_source('digits')
  assert_same(take(train_batches(source, **KW, workers=2, start=3), 5), take(train_batches(source, **KW, start=3), 5))
  kw = dict(batch_size=4, size=(4, 4))
  source = Broken(7, [4, 5])
  workers = eval_batches(source, **kw, workers=2)
  with pytest.raises(UserError, match='2 images .* of the 7 .*number 4, cannot read image 4.jpg: torn'):  # it crosses
    list(workers)


@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_goes_once_through_the_source_and_masks_the_rest(processes):
  def run(limit):
    shares = [list(eval_batches(numbered(10), batch_size=4, size=(4, 4), limit=limit, process_index=p,
                                process_count=processes)) for p in range(processes)]
    label, mask, image = (np.concatenate([share[b][name] for b in range(len(shares[0])) for share in shares])
                          for name in ('label', 'mask', 'image'))
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(image[:, 0, 0, 0], label)
    return label.tolist(), mask.tolist()
  label, mask = run(None)
  assert label[:10] == list(range(10)) and mask == [1] * 10 + [0] * 2
  label, mask = run(5)
  assert label == [1, 3, 5, 7, 9, 0, 0, 0] and mask == [1] * 5 + [0] * 3


def test_a_few_unreadable_images_are_replaced_and_counted():
  source = Broken(1000, range(500, 505))
  batches = train_batches(source, batch_size=100, size=(4, 4), seed=0)
  labels = np.concatenate([next(batches)['label'] for _ in range(10)])
  assert (batches.skipped, batches.drawn) == (5, 1000)
  assert np.bincount(labels, minlength=1000)[499:507].tolist() == [1, 0, 0, 0, 0, 0, 6, 1]
  batches.close()


def test_too_many_unreadable_images_are_an_error_with_name_and_reason():
  batches = train_batches(Broken(20, [7, 9]), batch_size=20, size=(4, 4), seed=0)
  with pytest.raises(UserError, match=r'2 images .* 1% of the 20 .*number [79], cannot read image [79].jpg: torn'):
    next(batches)
  batches = eval_batches(Broken(1000, range(11)), batch_size=50, size=(4, 4))
  with pytest.raises(UserError, match='11 images are unreadable'):
    next(batches)
  batches = train_batches(Broken(300, range(300)), batch_size=2, size=(4, 4), seed=0)
  with pytest.raises(UserError, match='100 images in a row .* image [0-9]+.jpg: torn'):
    next(batches)


def test_an_unreadable_image_is_masked_in_an_evaluation_and_stops_none():
  batches = eval_batches(Broken(100, [12]), batch_size=4, size=(4, 4), limit=4)  # 12, 37, 62 and 87
  batch, = batches
  assert batch['mask'].tolist() == [0, 1, 1, 1] and batch['label'][1:].tolist() == [37, 62, 87]
  assert not batch['image'][0].any() and batches.skipped == 1
  assert batches.unreadable.first == 'number 12, cannot read image 12.jpg: torn'


def test_a_file_met_in_every_epoch_counts_once():
  batches = train_batches(Broken(10, [7]), batch_size=10, size=(4, 4), seed=0)
  take(batches, 20)
  assert (batches.skipped, batches.drawn) == (1, 200)


def test_the_limit_is_on_the_files_of_both_parts():
  train, held_out, together = Broken(190, [3]), Broken(10, [3]), Unreadable()
  train.total = held_out.total = 200  # of which 2 may be unreadable
  list(eval_batches(held_out, batch_size=10, size=(4, 4), unreadable=together))
  kw = dict(batch_size=190, size=(4, 4), seed=0, unreadable=together)
  take(train_batches(train, **kw), 2)
  list(eval_batches(held_out, batch_size=10, size=(4, 4), unreadable=together))
  assert len(together) == 2
  train.bad.add(5)
  batches = train_batches(train, **kw)
  with pytest.raises(UserError, match='3 images .* of the 200 .*number 3, '):
    take(batches, 2)


class Slow:
  """A source that counts how many read from it at a time."""
  class_names, total = ('a',), 10_000

  def __init__(self):
    self.now = self.most = 0
    self.lock = threading.Lock()

  def __len__(self):
    return self.total

  def __getitem__(self, index):
    with self.lock:
      self.now += 1
      self.most = max(self.most, self.now)
    time.sleep(0.01)
    with self.lock:
      self.now -= 1
    return np.zeros((256, 256, 3), np.uint8), 0


@pytest.mark.parametrize('threads, least', [(0, 12), (32, 24)])
def test_a_large_batch_is_read_by_many_threads(threads, least):
  source = Slow()
  take(train_batches(source, batch_size=768, size=(256, 256), seed=0, enlarge=1, threads=threads), 1)
  assert least <= source.most <= (threads or 64)


def test_masked_rows_are_not_counted():
  batches = eval_batches(Broken(101, [0]), batch_size=100, size=(4, 4))
  assert len(list(batches)) == 2
  assert (batches.drawn, batches.skipped) == (101, 1)


def test_impossible_batches_are_refused():
  for change, match in ((dict(process_count=4), 'use a multiple'), (dict(batch_size=0), 'batch size 0'),
                        (dict(process_index=1), 'process_index 1')):
    with pytest.raises(UserError, match=match):
      train_batches(numbered(4), **KW | change)
  with pytest.raises(UserError, match='seed -1'):
    train_batches(numbered(4), **KW | {'seed': -1})
  with pytest.raises(UserError, match='empty'):
    eval_batches(numbered(0), batch_size=2, size=(4, 4))


def test_closing_twice_is_fine_and_ends_the_threads():
  before = threading.active_count()
  batches = train_batches(numbered(4), **KW)
  next(batches)
  batches.close()
  batches.close()
  for thread in threading.enumerate():
    if thread.name.startswith('grain-prefetch'):
      thread.join(5)
  assert threading.active_count() <= before
