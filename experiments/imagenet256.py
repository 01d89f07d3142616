"""VAR on ImageNet at 256 px as published (arXiv 2404.02905): 10 scales, 680 tokens. For TPU pods and GPU clusters.

python -m var_jax train --config=experiments/imagenet256.py:tokenizer --workdir=runs/imagenet256/tokenizer \
    --config.data.path=DIR/imagenet2012/5.1.0
python -m var_jax train --config=experiments/imagenet256.py:generator,depth=16 --workdir=runs/imagenet256/d16 \
    --config.data.path=DIR/imagenet2012/5.1.0 --config.tokenizer=runs/imagenet256/tokenizer
DIR: prepared once by tensorflow-datasets in the ArrayRecord format, from a folder that has ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar of image-net.org (reading DIR later takes 'var_jax[tfds]' alone):
pip install 'var_jax[tfds_prepare]'
tfds build imagenet2012 --file_format=array_record --manual_dir=FOLDER_OF_THE_TARS --data_dir=DIR
--config.data.source=folder takes ImageNet's own layout instead.
The tokenizer's loss has LPIPS, whose weights are not ours to give: --config.loss.lpips_weights=FILE,FILE names
torchvision's vgg16-397923af.pth (download.pytorch.org/models) and the heads, lpips/weights/v0.1/vgg.pth of the PyPI
package lpips; or --config.loss.lpips=0. On several machines give absolute paths that all of them see.

Expect, as published (not measured here, where no accelerator is at hand): FID 3.30, 2.57, 2.09, 1.92 for depth 16, 20,
24, 30 with cfg 1.5, top_k 900, top_p 0.96; training loss of depth 16, mean and last scale, 6.541 and 5.960 after 10
epochs, 6.252 and 5.584 after 50, 6.046 and 5.345 after 200, where token accuracy is 5.2 and 7.9 %. The tokenizer's
training was never published: its recipe is that of a related single-scale one, with our remedy against collapse.
"""

from var_jax import configs
from var_jax.errors import UserError

# depth: batch, epochs, peak learning rate, initial AdaLN gamma, end ratio, final weight decay
RECIPES = {
    16: (768, 200, 3e-4, 1e-3, 0.1, 0.05),
    20: (768, 250, 3e-4, 1e-3, 0.1, 0.05),
    24: (768, 350, 2.4e-4, 1e-4, 0.01, 0.05),
    30: (1024, 350, 3.2e-4, 1e-5, 0.01, 0.08),
}


def get_config(argument='tokenizer'):
  stage, options = configs.parse_argument(argument, depth=16, runlocal=False)
  config = _tokenizer() if stage == 'tokenizer' else _generator(options['depth'])
  return configs.on_imagenet(config, options['runlocal'])


def _tokenizer():
  config = configs.tokenizer()
  config.update(batch_size=768, epochs=100.0)
  config.loss.update(lpips=1.0, lpips_weights='vgg16_lpips.safetensors', adversarial=0.4)
  config.codebook.update(restart_every=100, scale_dropout=0.1)
  return config


def _generator(depth):
  if depth not in RECIPES:
    raise UserError(f'there is no published recipe for depth={depth}: use one of {", ".join(map(str, RECIPES))}')
  batch, epochs, rate, gamma, end_ratio, decay_end = RECIPES[depth]
  config = configs.generator(depth)
  config.update(batch_size=batch, epochs=float(epochs))
  config.optimizer.update(peak_lr=rate, end_ratio=end_ratio, decay_end=decay_end)
  config.model.adaln_gamma = gamma
  return config
