"""VAR on your own images: DIR/train/CLASS/*.jpg (png, webp), and DIR/val/CLASS or a held-out 5 %. 128 px by default.

python -m var_jax train --config=experiments/folder.py:tokenizer,size=128 --workdir=runs/mine/tokenizer \
    --config.data.path=DIR
python -m var_jax train --config=experiments/folder.py:generator,depth=12 --workdir=runs/mine/generator \
    --config.data.path=DIR --config.tokenizer=runs/mine/tokenizer
Sizes: 64, 128 or 256. Meant for one accelerator and some thousand images a class; add runlocal to try it on a CPU,
at 64 px whatever the size.
Not measured: what to expect depends on the images. Watch validation/psnr and validation/usage in metrics.jsonl for the
tokenizer, validation/loss for the generator, and the pictures in TensorBoard for both.
"""

from var_jax import configs
from var_jax.errors import UserError

SCALES = {64: (1, 2, 3, 4), 128: (1, 2, 3, 4, 6, 8), 256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, size=128, depth=12, runlocal=False)
  size = options['size']
  if size not in SCALES:
    raise UserError(f'size={size} has no scale schedule here: use one of {", ".join(map(str, SCALES))}')
  size = 64 if options['runlocal'] else size
  config = _tokenizer(size) if stage == 'tokenizer' else configs.generator(options['depth'])
  config.data.source = 'folder'
  config.update(batch_size=128, epochs=200.0, eval_images=2000, log_every=100)
  if options['runlocal']:
    configs.run_locally(config)
    if stage == 'tokenizer':
      config.model.update(ch=16, codes=64, channels=16, res_blocks=1, groups=8)
      config.loss.discriminator_ch = 8
    else:
      config.model.update(depth=2, width=64, heads=2)
  return config


def _tokenizer(size):
  config = configs.tokenizer()
  config.image_size = (size, size)
  config.model.update(scales=SCALES[size], ch=96)
  config.loss.update(adversarial=0.4)
  config.codebook.update(restart_every=100, scale_dropout=0.1)
  return config
