"""The Inception features and the Fréchet distance give the reference implementation's numbers."""

import golden_files
import jax
import numpy as np
import pytest

from var_jax.errors import UserError
from var_jax.evaluation import frechet, inception


@pytest.fixture(scope='module')
def golden():
  return golden_files.load('inception')


@pytest.fixture(scope='module')
def tensors():
  return golden_files.weights('', 'inception_manifest.json')[1]


@pytest.fixture(scope='module')
def params(tensors):
  return inception.from_torch(tensors)


@pytest.fixture(scope='module')
def features(params, golden):
  return jax.jit(inception.features)(params, golden['images_uint8'])


@pytest.mark.parametrize('name', ['pool', 'logits', 'block0_mean', 'block1_mean', 'block2_mean'])
def test_features_match_reference(features, golden, name):
  golden_files.assert_close(features[name], golden[name], rtol=1e-5)


def test_spatial_features_are_the_first_branch_of_mixed_6d(params, features, golden):
  """Recomputed from the block's input: (image, row, column, channel), after the ReLU."""
  x = inception.prepare(golden['images_uint8'], 'half_pixel')
  names = [name for name, _ in inception.NETWORK]
  before = inception.NETWORK[:names.index('Mixed_6d')]
  branch = inception.Conv('branch1x1', 192)

  @jax.jit
  def first_branch(x):
    for name, layer in before:
      x = inception._apply(params, name, layer, x, 'highest')
    return inception._apply(params, 'Mixed_6d', branch, x, 'highest')

  expected = first_branch(x)
  assert expected.shape == (3, 17, 17, 192) and expected.min() == 0
  golden_files.assert_close(features['spatial'], expected[..., :7].reshape(3, -1), rtol=1e-5)


def test_unbiased_logits_lack_the_last_bias_alone(params, features):
  bias = np.broadcast_to(params['fc']['bias'], (3, 1008))
  np.testing.assert_allclose(features['logits'] - features['logits_unbiased'], bias, atol=1e-6)


@pytest.mark.parametrize('resize, expected', [
    ('half_pixel', [[1, 0], [.75, .25], [.25, .75], [0, 1]]), ('tf1', [[1, 0], [.5, .5], [0, 1], [0, 1]])])
def test_resize_has_the_pixel_centres_of_its_framework(resize, expected):
  np.testing.assert_array_equal(inception.resize_matrix(2, 4, resize), expected)
  np.testing.assert_array_equal(inception.resize_matrix(299, 299, resize), np.eye(299))


def test_input_scaling_is_that_of_its_framework():
  grey = np.full((1, 8, 8, 3), 255, np.uint8)
  np.testing.assert_allclose(inception.prepare(grey, 'half_pixel'), 1, atol=1e-6)
  np.testing.assert_allclose(inception.prepare(grey, 'tf1'), 127 / 128, atol=1e-6)
  with pytest.raises(ValueError, match='tf1'):
    inception.prepare(grey, 'bicubic')


def test_wrong_weights_are_named(tensors):
  with pytest.raises(UserError, match=r'misshapen fc.weight \(1000, 2048\)'):  # torchvision's classifier
    inception.from_torch(tensors | {'fc.weight': np.zeros((1000, 2048))})
  with pytest.raises(UserError, match='unexpected AuxLogits.conv0.conv.weight'):
    inception.from_torch(tensors | {'AuxLogits.conv0.conv.weight': np.zeros(1)})
  with pytest.raises(UserError, match='missing Mixed_7c.branch3x3dbl_3b.bn.running_var'):
    inception.from_torch({k: v for k, v in tensors.items() if k != 'Mixed_7c.branch3x3dbl_3b.bn.running_var'})
  inception.from_torch(tensors | {'Mixed_7c.branch1x1.bn.num_batches_tracked': np.array(0)})


def test_frechet_distance_matches_reference(golden):
  a, b = (frechet.statistics(golden[name]) for name in ('feats_a', 'feats_b'))
  np.testing.assert_allclose(frechet.frechet_distance(*a, *b), golden['frechet_ab'], rtol=1e-9)
  np.testing.assert_allclose(frechet.frechet_distance(*b, *a), golden['frechet_ab'], rtol=1e-9)


def test_statistics_are_numpys_whatever_the_chunk(golden):
  mu, sigma = frechet.statistics(golden['feats_a'], chunk=37)
  assert sigma.dtype == np.float64
  np.testing.assert_allclose(mu, golden['feats_a'].mean(0, dtype=np.float64))
  np.testing.assert_allclose(sigma, np.cov(golden['feats_a'].astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-10)


def test_frechet_distance_of_singular_covariances():
  """Fewer samples than features: against the closed form where both share their axes, and zero for itself."""
  rng = np.random.default_rng(0)
  axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
  values1, values2 = rng.uniform(0, 9, (2, 64))
  values1[20:], values2[:10] = 0, 0
  mu1, mu2 = rng.normal(size=(2, 64))
  sigma1, sigma2 = ((axes * values) @ axes.T for values in (values1, values2))
  expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(values1) - np.sqrt(values2)) ** 2)
  np.testing.assert_allclose(frechet.frechet_distance(mu1, sigma1, mu2, sigma2), expected, rtol=1e-9)
  mu, sigma = frechet.statistics(rng.normal(size=(20, 64)))
  assert 0 <= frechet.frechet_distance(mu, sigma, mu, sigma) < 1e-9
  zero = np.zeros_like(sigma)
  np.testing.assert_allclose(frechet.frechet_distance(mu, sigma, mu, zero), np.trace(sigma), rtol=1e-9)


def test_statistics_that_make_no_sense_are_told():
  with pytest.raises(UserError, match='at least 2'):
    frechet.statistics(np.zeros((1, 4)))
  with pytest.raises(UserError, match='NaN'):
    frechet.statistics(np.full((3, 4), np.nan))
  with pytest.raises(UserError, match='4 and 5 features'):
    frechet.frechet_distance(np.zeros(4), np.eye(4), np.zeros(5), np.eye(5))
