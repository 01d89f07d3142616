"""A few images stand for all classes, whatever the order of the data."""

import numpy as np
import pytest
from tiny_images import Broken, numbered

from var_jax.data.arrays import ArraySource
from var_jax.data.spread import spread


def of_labels(labels):
  labels = np.asarray(labels)
  return ArraySource(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, tuple(map(str, range(labels.max() + 1))))


@pytest.mark.parametrize('labels', [np.repeat(np.arange(5), 20), np.tile(np.arange(5), 20)])
def test_every_class_gives_equally_many(labels):
  chosen = spread(of_labels(labels), 10)
  assert len(set(chosen.tolist())) == 10 and chosen.tolist() == sorted(chosen)
  assert np.bincount(labels[chosen]).tolist() == [2] * 5


def test_a_small_class_gives_all_it_has_and_the_others_the_rest():
  labels = np.repeat([0, 2, 3], [1, 50, 50])  # a class without images too
  assert np.bincount(labels[spread(of_labels(labels), 11)]).tolist() == [1, 0, 5, 5]


def test_fewer_images_than_classes_come_from_distant_classes():
  assert spread(numbered(100), 4).tolist() == [12, 37, 62, 87]


def test_a_source_without_labels_at_hand_gives_evenly_distant_images():
  assert spread(Broken(100, range(100)), 4).tolist() == [12, 37, 62, 87]  # nothing is read


def test_as_many_as_there_are_come_in_the_order_of_the_source():
  for count in (7, 8):
    assert spread(numbered(7), count).tolist() == list(range(7))
  for count in range(7):
    assert len(set(spread(of_labels([0, 0, 1, 1, 1, 2, 2]), count).tolist())) == count
