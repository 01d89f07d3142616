"""Do samples show the class that was asked for? A classifier trained on the real images says so.

It is no part of the models. Its figures have names of their own: they are not FID, and say nothing beside those of
other data sets.
"""

import hashlib
import json
import pathlib

import numpy as np

from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.evaluation import fid
from var_jax.evaluation.image_sets import ArrayImages, SourceImages
from var_jax.evaluation.judge import export_judge, load_judge, save_judge, train_judge
from var_jax.training import processes

MOST_IMAGES = 60_000  # real images to train the judge on, evenly taken
MOST_COMPARED = 10_000  # of them for precision and recall
AT_A_TIME = 16  # images of a source that are decoded: they may be photos


class RealImages:
  """The real images of a config's data: `train` and `held_out`, each (images (N, H, W, 3) uint8, labels (N,)); and the
  `class_names`.
  """

  def __init__(self, config, size):
    source = open_source(config.data.source, config.data.path, 'train')
    self.class_names, self.train = source.class_names, _images(source, size, config.data.workers)
    held_out = open_source(config.data.source, config.data.path, 'validation')
    self.held_out = _images(held_out, size, config.data.workers)

  @property
  def classes(self):
    return len(self.class_names)


def find_judge(real, folder):
  """The judge of these images: the one in `folder/judge.npz` if it was trained on the same, else a new one.

  It is kept there, and as an artifact in `judge.jaxexport`.
  """
  images, labels = real.train
  digest = hashlib.sha256(json.dumps([images.shape, real.classes]).encode())
  digest.update(np.ascontiguousarray(images))
  digest.update(labels.tobytes())
  name = digest.hexdigest()[:12]
  path = pathlib.Path(folder) / 'judge.npz'
  judge = load_judge(path, name, images.shape[1:], real.classes)
  if judge is None:
    judge = train_judge(images, labels, real.classes, progress=True)
    if processes.is_first():
      path.with_suffix('.jaxexport').unlink(missing_ok=True)  # first: it must not stay beside another judge
      save_judge(path, name, judge)
  if processes.is_first() and not path.with_suffix('.jaxexport').exists():
    export_judge(path.with_suffix('.jaxexport'), judge)
  return judge


def figures(judge, real, images_NxHxWx3, labels_N=None, by_name=False):
  """{name: number}: the judge's accuracy on held-out real images; how often it takes samples for their label, in all
  and of the weakest class; Fréchet distance, precision and recall of its hidden layer to the training images.
  by_name: each class's share too.
  """
  train = real.train[0][np.linspace(0, len(real.train[0]) - 1, min(len(real.train[0]), MOST_COMPARED)).astype(int)]
  extractor = fid.judge_extractor(judge)
  compared = fid.compare(*(fid.gather(ArrayImages(images), extractor) for images in (images_NxHxWx3, train)))
  found = {'judge_accuracy_on_real_images': judge.accuracy(*real.held_out), 'samples': len(images_NxHxWx3)}
  if labels_N is not None:
    if not 0 <= labels_N.min() <= labels_N.max() < real.classes:
      raise UserError(f'labels of the samples run from {labels_N.min()} to {labels_N.max()}, the data has classes 0 to '
                      f'{real.classes - 1}: give labels of this data, or leave them out')
    right = judge.predict(images_NxHxWx3) == labels_N
    by_class = {int(label): float(right[labels_N == label].mean()) for label in np.unique(labels_N)}
    weakest = min(by_class, key=by_class.get)
    found |= {'samples_judged_as_their_class': float(right.mean()), 'of_the_weakest_class': by_class[weakest],
              'weakest_class': weakest}
    if by_name:
      found |= {'weakest_class_name': real.class_names[weakest],
                'by_class': {f'{label} {real.class_names[label]}': share for label, share in by_class.items()}}
  return found | {'classifier_frechet_distance': compared['fid'], 'classifier_precision': compared['precision'],
                  'classifier_recall': compared['recall']}


def _images(source, size, workers):
  """((N, h, w, 3) uint8, (N,) labels) of a source, whole images without crop; at most MOST_IMAGES."""
  index = np.linspace(0, len(source) - 1, min(len(source), MOST_IMAGES)).astype(int)
  batches = SourceImages(source, size, index, workers).labelled(AT_A_TIME)
  images, labels = zip(*batches)
  return np.concatenate(images), np.concatenate(labels).astype(int)
