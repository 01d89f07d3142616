"""The evaluation's figures during training: samples of one seed against the real images, every N steps."""

import jax
import numpy as np

from var_jax.evaluation import classes, fid, run
from var_jax.evaluation.image_sets import ArrayImages
from var_jax.model import Model


def measure(stage, config, workdir):
  """A function: state of the generator's training -> {name: number}; None where `config.measure.every` is 0.

  By the FID Inception with `config.measure.inception`, a weight file; else by a classifier of the training images.
  """
  if config.stage != 'generator' or not config.measure.every:
    return None
  options = config.measure
  labels = np.repeat(np.arange(stage.generator.classes), options.per_class)
  size = stage.tokenizer.image_size
  if options.inception:
    extractor = fid.inception_extractor(options.inception, options.resize)
    if options.reference:
      reference = run.reference_of(options.reference, extractor)
    else:
      reference = run.own_reference(workdir, config, size, extractor, options.inception, options.resize)
    compare = lambda images: fid.compare(fid.gather(ArrayImages(images), extractor), reference)
  else:
    real = classes.RealImages(config, size)
    judge = classes.find_judge(real, workdir)
    compare = lambda images: classes.figures(judge, real, images, labels)
  model = None

  def figures(state):
    nonlocal model
    if model is None:  # one model, for its sampler is compiled once
      mesh = jax.tree.leaves(state.model)[0].sharding.mesh
      model = Model(stage.tokenizer, state.frozen['tokenizer'], stage.generator, state.model, mesh)
    model.params = {'tokenizer': state.frozen['tokenizer'], 'generator': state.model}  # earlier ones were donated
    return compare(model.sample(labels, 0, **config.sample).images)

  return figures
