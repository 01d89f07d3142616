"""`var-jax train`: any stage of any experiment; resumes by itself."""

import functools
import pathlib
import textwrap

import jax

from var_jax import axes, lineage, lock, paths
from var_jax import workdir as workdir_lib
from var_jax.commands import experiment, flags
from var_jax.errors import UserError, note
from var_jax.training import processes

EXAMPLE = (
    'var-jax train --config=experiments/digits.py:tokenizer --workdir=runs/digits/tokenizer --config.seed=1\n'
    '  later: var-jax train --workdir=runs/digits/tokenizer')
RESUMING = """Trains a tokenizer or a generator. Run it again to resume; then --workdir alone is enough.
What may change when a run is resumed, all else being refused:
"""


def main(arguments):
  free = textwrap.fill(', '.join(workdir_lib.RUN_ONLY), 100, initial_indent='  ', subsequent_indent='  ')
  parser = flags.Parser('train', RESUMING + free, EXAMPLE)
  parser.add_argument('--config', metavar='FILE.py[:ARG]', help='experiment; ARG: tokenizer or generator, then options '
                      'such as depth=16 or runlocal (a minute on a CPU); default: the settings of the run in --workdir')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='where the run is kept')
  parser.add_argument('--config.NAME', dest='unused', metavar='VALUE', help='any setting of var_jax/configs.py, '
                      'such as --config.optimizer.peak_lr=1e-4 or, for a generator, --config.tokenizer=DIR')
  flags.add_distributed(parser)
  options, overrides = parser.parse_known_args(arguments)
  with flags.together(options):
    return run(_config(options, overrides), options.workdir)


def _config(options, overrides):
  """The config that a command line asks for."""
  if options.config:
    return flags.read_config(options.config, overrides)
  if not (pathlib.Path(options.workdir) / 'config.json').exists():
    raise UserError(f'{options.workdir} holds no run that could go on: add --config=FILE.py:tokenizer or '
                    'FILE.py:generator to begin one, such as --config=experiments/digits.py:tokenizer')
  return experiment.with_overrides(workdir_lib.read_config(options.workdir), overrides)


def run(config, workdir):
  """Trains what a config says. Returns the exit status: 0, or 128 + the signal that stopped it.

  Everything that can be refused is refused before anything is written.
  """
  from var_jax.data.sources import open_source
  from var_jax.training.checkpoint import Checkpoints

  check(config)
  tokens = config.stage == 'generator'
  sources = [open_source(config.data.source, config.data.path, split, tokens) for split in ('train', 'validation')]
  if config.stage == 'generator':
    _set_classes(config, sources[0])
  changed, steps = workdir_lib.check_config(workdir, config), _steps(config, sources[0])
  workdir_lib.check_class_names(workdir, sources[0].class_names)
  before = _steps(workdir_lib.read_config(workdir), sources[0]) if changed else steps
  stage, keep_tokenizer = make_stage(config, workdir, steps)
  if config.data.source == 'tokens':
    _check_tokens(config, sources[0], stage)
  with lock.alone(workdir) as guard:
    with Checkpoints(workdir, config.keep, config.keep_every, clean=True, guard=guard) as checkpoints:
      return _train(stage, config, sources, workdir, checkpoints, keep_tokenizer, changed, before)


def _steps(config, source):
  """How many steps a run takes."""
  return config.steps or max(1, round(config.epochs * len(source) / config.batch_size))


def _train(stage, config, sources, workdir, checkpoints, keep_tokenizer, changed, before):
  from var_jax.data.sources import summary
  from var_jax.evaluation.during import measure
  from var_jax.training import loop

  stage.check_metadata(checkpoints.newest_metadata())
  workdir_lib.write_config(workdir, config)
  workdir_lib.write_class_names(workdir, sources[0].class_names)
  keep_tokenizer()
  if processes.is_first():
    note(summary(*sources))
  for change in changed:
    note(change)
  if before != stage.steps and (saved := checkpoints.steps()):
    note(_on_length(config.optimizer, before, stage.steps, saved[-1]))
  keep = functools.partial(lineage.keep_best, workdir, config, stage.metadata)
  try:
    state = loop.train(
        stage, config, *sources, checkpoints, workdir, measure=measure(stage, config, workdir), keep=keep)
  except loop.Interrupted as stop:
    note(str(stop))
    return 128 + stop.signal_number
  if processes.is_first():
    note(f'trained to step {int(state.step)}: {workdir}')
  return 0


def _on_length(config, before, steps, step):
  """What another length of a run does to what is a share of it."""
  from var_jax.training.optimizer import rate_of

  old, new = (float(rate_of(config, length)(step)) for length in (before, steps))
  return (f'the run is now {steps} steps long, it was {before}: all that is a share of it moves, so at step {step} the '
          f'learning rate goes from {old:.3g} to {new:.3g}')


def _check_tokens(config, source, stage):
  """Raises UserError unless tokens are those of the stage's tokenizer, and all that the run needs."""
  made, given = (source.fingerprint, source.scales), (stage.metadata['tokenizer'], stage.tokenizer.pyramid.scales)
  if made != given:
    raise UserError(
        f'the tokens in {config.data.path} were made by another tokenizer (fingerprint {made[0]}, {len(made[1])} '
        f'scales; given {given[0]}, {len(given[1])}): run `var-jax tokenize` with this one, or train with theirs, by '
        '--config.tokenizer')
  if config.measure.every:
    raise UserError('measure.every compares samples with real images, which tokens are not: leave it at 0')


LIMITS = {  # setting: (least, most) of what a run can use
    'model.depth': (1, None),
    'seed': (0, 2**32 - 1), 'batch_size': (1, None), 'accumulate': (1, None), 'steps': (0, None), 'epochs': (0, None),
    'ema': (0, 0.9999999), 'keep': (1, None), 'keep_every': (0, None),
    'max_skipped_in_row': (1, None), 'log_every': (0, None),
    'eval_every': (0, None), 'eval_images': (0, None), 'pictures_every': (0, None), 'checkpoint_every': (0, None),
    'data.enlarge': (1, None), 'data.workers': (0, None), 'optimizer.warmup': (0, 1), 'label_drop': (0, 1),
    'label_smoothing': (0, 1), 'distill': (0, 100), 'scale_weights.sigma': (0, None), 'drop_path': (0, 0.99),
    'codebook.scale_dropout': (0, 1), 'codebook.restart_every': (0, None),
    'codebook.restart_after': (1, None), 'model.codes': (1, None), 'model.channels': (1, None), 'model.ch': (1, None),
    'model.res_blocks': (0, None), 'model.groups': (1, None), 'model.phi_layers': (0, None),
    'model.width': (0, None), 'model.heads': (0, None), 'model.classes': (0, None), 'progressive.end': (0, 1),
    'progressive.start_scale': (0, None), 'measure.every': (0, None), 'measure.per_class': (1, None),
    'loss.adversarial_start': (0, 1), 'sample.cfg': (0, 100), 'sample.top_k': (0, None), 'sample.top_p': (0, 1),
}


def check_numbers(config):
  """Raises UserError for a number that is out of its range."""
  for name, (least, most) in LIMITS.items():
    value = _lookup(config, name)
    if value is not None and not (least <= value and (most is None or value <= most)):
      raise UserError(f'{name} is {value}: it must be {least} or more' + (f', and at most {most}' if most else ''))


def check(config):
  """Raises UserError for values that no run can use."""
  from var_jax.training import mesh
  from var_jax.training.optimizer import SCHEDULES

  check_numbers(config)
  if config.optimizer.schedule not in SCHEDULES:
    raise UserError(f'there is no schedule {config.optimizer.schedule!r}: use one of {", ".join(SCHEDULES)}')
  if not all(0 <= beta < 1 for beta in config.optimizer.betas) or len(config.optimizer.betas) != 2:
    raise UserError(f'optimizer.betas are {config.optimizer.betas}: give two numbers, each at least 0 and below 1')
  if not config.steps and not config.epochs:
    raise UserError('the run has no length: set --config.steps=N or --config.epochs=N')
  if not config.optimizer.peak_lr > 0:
    raise UserError(f'optimizer.peak_lr is {config.optimizer.peak_lr}: it must be above 0')
  mesh.check_batch(config.batch_size, mesh.make_mesh(**config.mesh), config.accumulate)


def _lookup(config, name):
  """The value of a dotted name, None where this stage has no such setting."""
  for part in name.split('.'):
    if part not in config:
      return None
    config = config[part]
  return config


def _set_classes(config, source):
  """Writes into the config how many classes the data has, unless it says so itself."""
  config.model.classes = config.model.classes or len(source.class_names)
  if config.model.classes < len(source.class_names):
    raise UserError(
        f'model.classes is {config.model.classes}, but the data has {len(source.class_names)} classes: set it to 0')


def make_stage(config, workdir, steps):
  """(stage, what puts its tokenizer's copy into the workdir)."""
  if config.stage == 'tokenizer':
    from var_jax.stages.tokenizer import TokenizerStage

    tokenizer = workdir_lib.make_tokenizer(config)
    _check_frozen(config, lambda: workdir_lib.tokenizer_shapes(tokenizer))
    initial = lineage.initial_tokenizer(workdir, config, tokenizer)
    return TokenizerStage(config, tokenizer, steps, initial, _lpips(config.loss)), lambda: None
  from var_jax.generator import attention
  from var_jax.stages.generator import GeneratorStage

  place, tokenizer, params = lineage.find_tokenizer(workdir, config.tokenizer)
  generator = workdir_lib.make_generator(config, tokenizer)
  needs = attention.DEVICES.get(config.attention)
  if needs and axes.platform() not in needs:
    raise UserError(f'attention={config.attention!r} needs a {needs[0]}, this is a {axes.platform()}: leave it at auto')
  _check_frozen(config, lambda: workdir_lib.generator_shapes(generator))
  if config.progressive.end and config.progressive.start_scale >= len(generator.pyramid):
    raise UserError(f'progressive.start_scale is {config.progressive.start_scale}, but scales count from 0 to '
                    f'{len(generator.pyramid) - 1}: choose a smaller one')
  if config.distill and not config.start_from:
    raise UserError('distill needs a model whose guidance is learned: add --config.start_from=DIR, its workdir')
  initial = lineage.initial_generator(workdir, config, generator)
  guide = lineage.find_guide(config, generator, params) if config.distill else None
  stage = GeneratorStage(
      config, generator, tokenizer, params, workdir_lib.fingerprint(params), steps, initial, guide)
  return stage, lambda: lineage.keep_tokenizer(workdir, place, params)


def _lpips(loss):
  """The weights of the perceptual loss, None where it has none."""
  if not loss.lpips:
    return None
  from var_jax.tokenizer import lpips

  if not loss.lpips_weights:
    raise UserError('loss.lpips needs weights: set --config.loss.lpips=0, or --config.loss.lpips_weights='
                    f'{lpips.FILES}')
  return lpips.load(*paths.split(loss.lpips_weights))


def _check_frozen(config, shapes):
  """Raises UserError for patterns in `freeze` that name nothing, or a codebook that restarts would change."""
  from var_jax.training.optimizer import frozen_names

  if not config.freeze:
    return
  params = shapes()
  frozen = frozen_names(params, config.freeze)
  if len(frozen) == len(jax.tree.leaves(params)):
    raise UserError(f'freeze={config.freeze} names every parameter, so there is nothing to train: name fewer')
  if 'quantizer/codebook' in frozen and config.codebook.restart_every:
    raise UserError('freeze names the codebook, which restarts would change: set --config.codebook.restart_every=0')
