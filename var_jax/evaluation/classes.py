"""Do samples show the class that was asked for? A classifier trained on the real images says so.

It is no part of the models. Its figures are not comparable with FID or with other data sets' figures.
"""

import numpy as np

from var_jax.data.images import fit
from var_jax.data.sources import open_source
from var_jax.evaluation.judge import train_judge

MOST_IMAGES = 60_000  # real images to train the judge on, evenly taken


def figures(model, config, per_class, seed, choices):
  """{name: number}: the judge's accuracy on held-out real images, and on samples in all and of the weakest class.

  choices: keyword arguments of `Model.sample` (cfg, top_k, top_p, temperature, smooth).
  """
  size = model.tokenizer.image_size
  real, labels = _images(open_source(config.data.source, config.data.path, 'train'), size)
  judge = train_judge(real, labels, model.generator.classes, progress=True)
  held_out, held_out_labels = _images(open_source(config.data.source, config.data.path, 'validation'), size)
  asked = np.repeat(np.arange(model.generator.classes), per_class)
  samples = model.sample(asked, seed, progress=True, **choices)
  right = judge.predict(samples.images) == asked
  by_class = right.reshape(-1, per_class).mean(axis=1)
  return {
      'judge_accuracy_on_real_images': float(judge.accuracy(held_out, held_out_labels)),
      'samples': len(asked),
      'samples_judged_as_their_class': float(right.mean()),
      'of_the_weakest_class': float(by_class.min()),
      'weakest_class': int(by_class.argmin()),
      **choices,
  }


def _images(source, size):
  """((N, h, w, 3) uint8, (N,) labels) of a source, whole images without crop; at most MOST_IMAGES."""
  index = np.linspace(0, len(source) - 1, min(len(source), MOST_IMAGES)).astype(int)
  pairs = [source[int(i)] for i in index]
  return np.stack([fit(image, size, enlarge=1) for image, _ in pairs]), np.array([label for _, label in pairs])
