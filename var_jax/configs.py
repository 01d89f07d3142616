"""Every setting of a run with its default, in one place. An experiment names only what deviates from these.

Used by `experiments/*.py`, whose `get_config(argument)` gets what follows the colon in `FILE.py:generator,depth=16`,
and whose `sweep()`, where there is one, lists the points of `launch/sweep.py`: [{setting: value}, ...], or
{name: {setting: value}} to name them.
"""

import itertools

import ml_collections

from var_jax.errors import UserError

WORDS = {'': True, 'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def _common(stage):
  return ml_collections.ConfigDict(dict(
      stage=stage,
      seed=0,
      data=dict(
          source='digits',   # digits, folder, arrays, tfds, or for a generator tokens (see `var-jax tokenize`)
          path='',           # where the images are, for all but digits
          enlarge=1.125,     # resize to this many times the image's size, then crop at random; 1 to take the whole
          flip=False,
          workers=0,         # processes that decode images; 0 decodes in threads of the main process
          threads=0,         # how many threads; 0 for one a core, 16 to 64
      ),
      batch_size=768,        # images per step, over all devices
      accumulate=1,          # slices of a batch that are computed one after the other
      steps=0,               # 0: from epochs
      epochs=0.0,
      mesh=dict(data=-1, fsdp=1, tensor=1),  # devices along each axis, -1 for the rest; data: 0 for one a slice
      remat='none',          # what the backward pass computes again: none, pointwise, dots (attention too) or all
      dtype='float32',       # of activations: float32 or bfloat16; parameters and sums stay float32
      start_from='',         # a workdir whose parameters the run begins with, adapted to other classes and scales
      freeze='',             # parameters that stay as they are: patterns such as 'word_embed/*,blocks/attention/*'
      ema=0.0,               # decay of the average of the parameters; 0 for none
      max_skipped_in_row=20, # give up after so many steps without finite gradients
      log_every=50,          # steps between lines in metrics.jsonl
      eval_every=1000,
      eval_images=0,         # held-out images per evaluation; 0 for all
      pictures_every=1000,
      checkpoint_every=1000,
      keep=2,                # newest checkpoints to keep
      keep_every=0,          # steps: checkpoints at its multiples stay as well; 0 for none
      best='',               # keep the model of the lowest 'validation/loss' (or other scalar) in WORKDIR/best as well;
                             # '-' before the name for the highest
      optimizer=dict(
          peak_lr=3e-4,
          schedule='lin0',   # cos, lin, lin0, lin00 or exp
          warmup=0.02,       # fraction of the run
          start_ratio=0.005, # of the peak, at the first step
          end_ratio=0.1,     # of the peak, at the last step
          betas=(0.9, 0.95),
          decay=0.05,
          decay_end=0.05,    # weight decay moves from one to the other by half a cosine
          clip=2.0,          # global gradient norm; 0 for none
      ),
  ))


def tokenizer():
  """Defaults of the tokenizer stage: the published network, and a recipe for its unpublished training."""
  config = _common('tokenizer')
  config.image_size = (256, 256)
  config.ema = 0.9999
  config.optimizer.update(betas=(0.5, 0.9), decay=0.05, decay_end=0.05, clip=1.0)
  config.model = dict(
      scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # numbers or (height, width) pairs; the last is the latent's size
      codes=4096,
      channels=32,
      ch=160,
      ch_mult=(1, 1, 2, 2, 4),
      res_blocks=2,
      dropout=0.0,
      groups=32,             # of the group norms, at most
      phi_layers=4,
      phi_ratio=0.5,
      beta=0.25,             # weight of the commitment loss
      normalized_lookup=False,
  )
  config.loss = dict(
      l1=0.2,
      l2=1.0,
      quantizer=1.0,
      lpips=0.0,             # needs lpips_weights
      lpips_weights='',      # FILE or FILE,FILE: VGG-16 and its heads, see tokenizer/lpips.py; any weight file
      adversarial=0.0,       # relative to the reconstruction's gradient
      adversarial_start=0.22,  # fraction of the run
      discriminator_ch=64,
      discriminator_lr=3e-4,   # its peak; warm-up, from its start on, and schedule are the run's
  )
  config.codebook = dict(
      restart_every=0,       # steps between checks for dead codes; 0: never, as the published code
      scale_dropout=0.0,     # share of the images decoded from their coarser scales alone while training
      restart_after=2,       # checks in a row before which no step used a code, until it is put on a residual
  )
  return config


def generator(depth=16):
  """Defaults of the generator stage: the published recipe of that depth."""
  config = _common('generator')
  config.tokenizer = ''      # the workdir of the tokenizer to use
  config.model = dict(
      depth=depth,
      width=0,               # 0: 64·depth
      heads=0,               # 0: depth
      mlp_ratio=4.0,
      classes=0,             # 0: as many as the data has
      normalize_qk=True,
      shared_adaln=False,
      adaln_gamma=1e-3,      # initial scale of the gammas
      float32_residual=False,  # in bfloat16, add up the blocks' outputs in float32; the published code does not
      markov=False,          # whether tokens see their own scale alone, whose input sums up the coarser ones: no cache
  )
  config.attention = 'auto'  # auto, xla, cudnn (GPUs, in bfloat16) or splash (TPUs)
  config.drop_path = 0.1 * depth / 24
  config.label_drop = 0.1
  config.label_smoothing = 0.0
  config.distill = 0.0       # guidance (cfg) of the model in start_from that is learned, to sample without: with cfg=0
  config.scale_weights = dict(  # of the loss: log-normal in (k+1)/K at scale k
      mean=0.0,
      sigma=0.0,             # 0: all tokens weigh the same
  )
  config.progressive = dict(
      end=0.0,               # fraction of the run by which all scales are trained; 0: all from the start
      start_scale=4,         # finest scale at first
      ramp=0.01,             # fraction of the run over which a new scale's weight grows
  )
  config.sample = dict(cfg=1.5, top_k=900, top_p=0.96)  # of the pictures drawn while training
  config.measure = dict(
      every=0,               # steps between evaluations of samples, as samples/NAME in the metrics; 0 for none
      per_class=50,          # samples
      inception='',          # weights of the FID Inception; without, a classifier of the training images compares
      resize='tf1',          # for the Inception: tf1 or half_pixel
      reference='',          # for the Inception: an .npz of statistics or images; without, all training images are read
  )
  return config


def parse_argument(argument, **options):
  """'generator,depth=16,runlocal' -> ('generator', {'depth': 16, 'runlocal': True}), with `options` as defaults.

  Raises UserError for a stage or an option that does not exist, or a value of another type.
  """
  stage, *words = (argument or 'tokenizer').split(',')
  if stage not in ('tokenizer', 'generator'):
    raise UserError(f'there is no stage {stage!r}: write FILE.py:tokenizer or FILE.py:generator')
  values = dict(options)
  for word in words:
    name, _, text = word.partition('=')
    if name not in options:
      raise UserError(f'this experiment has no option {name!r}: it takes {", ".join(options)}')
    kind = type(options[name])
    try:
      values[name] = WORDS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
      raise UserError(f'option {name}={text!r} must be of type {kind.__name__}') from None
  return stage, values


def grid(axes):
  """{setting: values} -> the points of all combinations, the last setting changing fastest."""
  return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def zipped(axes):
  """{setting: values} -> points that take the first values, the second ones, and so on."""
  return [dict(zip(axes, values)) for values in zip(*axes.values(), strict=True)]


def run_locally(config, **changes):
  """Shrinks a run to a minute on a CPU: some steps, small batches, and a picture at the end."""
  config.update(
      batch_size=8, epochs=0.0, steps=20, log_every=5, eval_every=10, eval_images=16, pictures_every=20,
      checkpoint_every=10)
  config.update(changes)
  return config


def on_imagenet(config, runlocal):
  """Points a config at ImageNet and at pods, where all chips together keep one copy of a generator and each has its own
  of a tokenizer, which is small. runlocal: small networks of the same make on the digits, enlarged to 64 px.
  """
  config.data.source = 'tfds'
  config.update(eval_every=5000, eval_images=10000, pictures_every=5000, checkpoint_every=2500)
  if not runlocal:
    config.update(dtype='bfloat16', remat='pointwise')
    if config.stage == 'generator':
      config.mesh.update(data=0, fsdp=-1)
    return config
  config.data.source = 'digits'
  if config.stage == 'tokenizer':
    config.image_size = (64, 64)
    config.model.update(scales=(1, 2, 3, 4), ch=16, codes=64, channels=16, res_blocks=1, groups=8)
    config.loss.update(lpips=0.0, lpips_weights='', discriminator_ch=8)
  else:
    config.model.update(depth=2, width=64, heads=2)
  return run_locally(config)
