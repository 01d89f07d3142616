"""VAR on your own images: DIR/train/CLASS/*.jpg (png, webp, bmp, gif, tif), and DIR/val/CLASS or a held-out 5 %.

python -m var_jax train --config=experiments/folder.py:tokenizer,size=128 --workdir=runs/mine/tokenizer \
    --config.data.path=DIR
python -m var_jax train --config=experiments/folder.py:generator,depth=12 --workdir=runs/mine/generator \
    --config.data.path=DIR --config.tokenizer=runs/mine/tokenizer
Sizes: multiples of 16, 128 by default; below 64 px multiples of 4, from 16 on. Meant for one accelerator and some
thousand images a class.

cpu is a recipe for two cores without accelerator, and for some thousand images of 32 or 64 px:
python -m var_jax train --config=experiments/folder.py:tokenizer,size=32,cpu --workdir=runs/mine/tokenizer \
    --config.data.path=DIR
python -m var_jax train --config=experiments/folder.py:generator,cpu --workdir=runs/mine/generator \
    --config.data.path=DIR --config.tokenizer=runs/mine/tokenizer

runlocal shrinks any of it to twenty steps, to see that everything fits.
What to expect depends on the images. Watch validation/psnr and validation/usage in metrics.jsonl for the tokenizer,
validation/loss for the generator, and the pictures in TensorBoard for both.
"""

import math

from var_jax import configs
from var_jax.errors import UserError


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, size=128, depth=0, cpu=False, runlocal=False)
  size, cpu = _checked(options['size']), options['cpu']
  if options['runlocal'] and not cpu:
    size = 64
  if stage == 'tokenizer':
    config = _small_tokenizer(size) if cpu else _tokenizer(size)
  else:
    config = _small_generator(options['depth'] or 4) if cpu else configs.generator(options['depth'] or 12)
  config.data.source = 'folder'
  if cpu:
    config.data.enlarge = 1.0
    config.update(batch_size=64, steps=1000, ema=0.998, log_every=25, eval_every=250, eval_images=500,
                  pictures_every=500, checkpoint_every=250)
  else:
    config.update(batch_size=128, epochs=200.0, eval_images=2000, log_every=100)
  if options['runlocal']:
    configs.run_locally(config)
    if stage == 'tokenizer':
      config.model.update(ch=16, codes=64, channels=16, res_blocks=1, groups=8)
      config.loss.discriminator_ch = 8
    else:
      config.model.update(depth=2, width=64, heads=2)
  return config


def _checked(size):
  """The size. UserError for one that the strides of the network do not divide."""
  unit = 4 if size < 64 else 16
  if size < 16 or size % unit:
    near = max(16, size // unit * unit)
    raise UserError(f'size={size} does not fit the strides of the network: use {near} or {near + unit}')
  return size


def scales(latent, ratio=None):
  """Sizes of the token maps, coarse to fine: each is the next one times a ratio, which suits the latent's size.

  >>> scales(8)
  (1, 2, 3, 4, 6, 8)
  """
  doublings = math.log2(latent)
  ratio = ratio or 1 - 1 / (1 + max(1, min(doublings, 8 - doublings)))  # 3/4 at 8, 4/5 at 16, 3/4 at 32
  sizes = [latent]
  while sizes[0] > 1:
    sizes.insert(0, max(1, min(sizes[0] - 1, round(sizes[0] * ratio))))
  return tuple(sizes)


def _tokenizer(size):
  config = configs.tokenizer()
  config.image_size = (size, size)
  config.model.update(scales=scales(size // 16), ch=96)
  if size < 64:
    config.model.update(scales=scales(size // 4), ch_mult=(1, 2, 4))
  config.loss.update(adversarial=0.4)
  config.codebook.update(restart_every=100, scale_dropout=0.1)
  return config


def _small_tokenizer(size):
  config = configs.tokenizer()
  config.image_size = (size, size)
  config.optimizer.update(peak_lr=2e-3, betas=(0.9, 0.95), schedule='cos')
  config.model.update(codes=128, channels=16, ch=16, ch_mult=(1, 2, 4), res_blocks=1, groups=8)
  if size >= 64:
    config.model.update(ch=8, ch_mult=(1, 2, 4, 8))
  config.model.scales = scales(size // 2 ** (len(config.model.ch_mult) - 1), 0.6)
  config.codebook.update(restart_every=25, scale_dropout=0.2)
  return config


def _small_generator(depth):
  config = configs.generator(depth)
  config.optimizer.update(peak_lr=1e-3)
  config.model.update(width=128, heads=4)
  config.drop_path = 0.0
  config.sample.update(cfg=2.0, top_k=0, top_p=0.96)
  return config
