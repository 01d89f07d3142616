"""The generator's loss and accuracy on held-out images, teacher-forced, in total and per scale."""

import functools

import jax
import numpy as np

from var_jax.data import pipeline
from var_jax.data.floats import floats
from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.generator import losses
from var_jax.training import mesh as mesh_lib


def figures(model, config, batch_size=64):
  """{name: number}: mean cross entropy in nats a token, and accuracy, over all validation images of the config."""
  tokenizer, generator = model.tokenizer, model.generator
  source = open_source(config.data.source, config.data.path, 'validation')

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(model.mesh))
  def means(params, images, labels, mask):
    variables = {'params': params['tokenizer']}
    tokens = tokenizer.apply(variables, floats(images), method='encode')
    teacher = tokenizer.apply(variables, tokens, method='teacher_input')
    logits = generator.apply({'params': params['generator']}, labels, teacher)
    return losses.summarize(logits, tokens, generator.pyramid, mask)

  devices = mesh_lib.batch_parts(model.mesh)
  batch_size = -(-batch_size // devices) * devices
  batches = pipeline.eval_batches(source, batch_size=batch_size, size=tokenizer.image_size, enlarge=config.data.enlarge)
  sums, images = {}, 0
  for batch in batches:
    count = batch['mask'].sum()
    parts = (mesh_lib.put_whole(batch[name], model.mesh) for name in ('image', 'label', 'mask'))
    with jax.set_mesh(model.mesh):
      found = means(model.params, *parts)
    for name, value in found.items():
      sums[name] = sums.get(name, 0.0) + float(value) * count
    images += count
  batches.close()
  if not images:
    raise UserError(f'none of the {len(source)} held-out images can be read; the first: {batches.unreadable.first}')
  names = {name: name.replace('loss', 'validation_loss').replace('accuracy', 'validation_accuracy').replace('/', '_')
           for name in sums if not name.endswith('last')}
  return {'validation_images': int(images)} | {names[name]: float(np.float64(sums[name]) / images) for name in names}
