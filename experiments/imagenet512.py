"""VAR on ImageNet at 512 px as published (arXiv 2404.02905): depth 36, shared AdaLN, 10 scales, 2,240 tokens.

python -m var_jax train --config=experiments/imagenet512.py:tokenizer --workdir=runs/imagenet512/tokenizer \
    --config.data.path=DIR/imagenet2012/5.1.0
python -m var_jax train --config=experiments/imagenet512.py:generator --workdir=runs/imagenet512/d36 \
    --config.data.path=DIR/imagenet2012/5.1.0 --config.tokenizer=runs/imagenet512/tokenizer
DIR and the weights of LPIPS as in imagenet256.py. Expect, as published (not measured here): FID 2.63, Inception Score
303.2 at 2.3B parameters.
"""

from var_jax import configs


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, depth=36, runlocal=False)
  config = _tokenizer() if stage == 'tokenizer' else _generator(options['depth'])
  return configs.on_imagenet(config, options['runlocal'])


def _tokenizer():
  config = configs.tokenizer()
  config.update(image_size=(512, 512), batch_size=256, epochs=50.0)
  config.model.scales = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
  config.loss.update(lpips=1.0, lpips_weights='vgg16_lpips.safetensors', adversarial=0.4)
  config.codebook.update(restart_every=100, scale_dropout=0.1)
  return config


def _generator(depth):
  config = configs.generator(depth)
  config.update(batch_size=768, epochs=350.0)
  config.optimizer.update(peak_lr=2.4e-4, end_ratio=0.01, decay_end=0.08)
  config.model.update(shared_adaln=True, adaln_gamma=5e-6)
  return config
