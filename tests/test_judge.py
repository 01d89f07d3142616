"""The judge learns real digits well enough to be believed, and the same seed gives the same judge."""

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from var_jax.errors import UserError
from var_jax.evaluation import judge


@pytest.fixture(scope='module')
def digits():
  """(images (1797, 16, 16, 3) uint8, labels), shuffled: the set is sorted by writer."""
  data = sklearn.datasets.load_digits()
  images = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.LANCZOS))
                     for image in (data.images * 255 / 16).astype(np.uint8)])
  order = np.random.default_rng(0).permutation(len(images))
  return np.repeat(images[order, ..., None], 3, axis=-1), data.target[order]


@pytest.fixture(scope='module')
def trained(digits):
  images, labels = digits
  return judge.train_judge(images[:1500], labels[:1500], 10, epochs=12)


def test_held_out_digits_are_recognised(trained, digits):
  images, labels = digits[0][1500:], digits[1][1500:]
  predicted = trained.predict(images)
  assert predicted.shape == (297,) and predicted.dtype == np.int32
  assert trained.accuracy(images, labels) == np.mean(predicted == labels) >= 0.97
  assert trained.accuracy(images, (labels + 1) % 10) <= 0.03


def test_result_of_an_image_does_not_depend_on_its_batch(trained, digits):
  """Batches are filled up to one size; neither neighbours nor filling may leak."""
  images = digits[0][1500:]
  features = trained.features(images)
  assert features.shape == (297, 128) and features.dtype == np.float32
  np.testing.assert_allclose(trained.features(images[130:133]), features[130:133], rtol=1e-5, atol=1e-5)


def test_features_are_what_the_labels_are_read_from(trained, digits):
  images = digits[0][1500:]
  last = trained.params['Dense_4']
  np.testing.assert_array_equal((trained.features(images) @ last['kernel'] + last['bias']).argmax(-1),
                                trained.predict(images))


def test_same_seed_gives_same_judge(digits):
  images, labels = digits[0][:256], digits[1][:256]
  first, again, other = (judge.train_judge(images, labels, 10, seed=seed, epochs=2).params for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first['Dense_4']['kernel'], other['Dense_4']['kernel'])


def test_shifts_move_whole_images_by_the_given_pixels(digits):
  images, labels = digits[0][:8], digits[1][:8]
  batches = list(judge._batches(images, labels, 4, 3, 2, np.random.default_rng(0)))
  assert len(batches) == 6
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
  windows = {padded[i, y:y + 16, x:x + 16].tobytes(): labels[i] for i in range(8) for y in range(5) for x in range(5)}
  seen = {image.tobytes() for batch in batches for image in batch[0]}
  assert all(windows[image.tobytes()] == label for batch in batches for image, label in zip(*batch, strict=True))
  assert len(seen) > 8 and not seen <= {image.tobytes() for image in images}


def test_what_does_not_fit_together_is_told(trained, digits):
  images, labels = digits
  with pytest.raises(UserError, match='0..4'):
    judge.train_judge(images[:20], labels[:20], 5)
  with pytest.raises(UserError, match='give one each'):
    judge.train_judge(images[:20], labels[:19], 10)
  with pytest.raises(UserError, match='uint8'):
    judge.train_judge(images[:20] / 255, labels[:20], 10)
  with pytest.raises(UserError, match='16, 16, 3'):
    trained.predict(np.zeros((2, 32, 32, 3), np.uint8))
