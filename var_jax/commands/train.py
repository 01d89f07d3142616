"""`var-jax train`: any stage of any experiment; resumes by itself."""

import sys

from var_jax import workdir as workdir_lib
from var_jax.commands import flags
from var_jax.errors import UserError

EXAMPLE = 'var-jax train --config=experiments/digits.py:tokenizer --workdir=runs/digits/tokenizer --config.batch_size=64'


def main(arguments):
  parser = flags.Parser('train', 'Trains a tokenizer or a generator. Run it again to resume.', EXAMPLE)
  parser.add_argument('--config', required=True, metavar='FILE.py[:ARG]', help='experiment; ARG: tokenizer or '
                      'generator, then options such as depth=16 or runlocal (a minute on a CPU)')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='where the run is kept')
  parser.add_argument('--config.NAME', dest='unused', metavar='VALUE', help='any setting of var_jax/configs.py, '
                      'such as --config.optimizer.peak_lr=1e-4 or, for a generator, --config.tokenizer=DIR')
  options, overrides = parser.parse_known_args(arguments)
  config = flags.read_config(options.config, overrides)
  return run(config, options.workdir)


def run(config, workdir):
  """Trains what a config says. Returns the exit status: 0, or 128 + the signal that stopped it."""
  from var_jax.data.sources import open_source
  from var_jax.training import loop
  from var_jax.training.checkpoint import Checkpoints

  say = lambda text: print(text, file=sys.stderr, flush=True)
  check(config)
  sources = [open_source(config.data.source, config.data.path, split) for split in ('train', 'validation')]
  stage = make_stage(config, workdir, sources[0], say)
  workdir_lib.write_config(workdir, config)
  checkpoints = Checkpoints(workdir, config.keep, say)
  try:
    loop.train(stage, config, *sources, checkpoints, workdir, say=say)
  except loop.Interrupted as stop:
    say(str(stop))
    return 128 + stop.signal_number
  finally:
    checkpoints.close()
  say(f'trained to step {stage.steps}: {workdir}')
  return 0


def check(config):
  """Raises UserError for values that no run can use."""
  from var_jax.training.optimizer import SCHEDULES

  if config.batch_size < 1 or config.accumulate < 1:
    raise UserError('batch_size and accumulate must be at least 1')
  if config.optimizer.schedule not in SCHEDULES:
    raise UserError(f'there is no schedule {config.optimizer.schedule!r}: use one of {", ".join(SCHEDULES)}')
  if not 0 <= config.ema < 1:
    raise UserError(f'ema {config.ema} is not a decay between 0 (off) and 1, such as 0.999')
  if config.steps <= 0 and config.epochs <= 0:
    raise UserError('the run has no length: set --config.steps=N or --config.epochs=N')


def make_stage(config, workdir, source, say):
  """The stage that a config describes, with its models."""
  steps = config.steps or max(1, round(config.epochs * len(source) / config.batch_size))
  if config.stage == 'tokenizer':
    from var_jax.stages.tokenizer import TokenizerStage

    return TokenizerStage(config, workdir_lib.make_tokenizer(config), steps)
  from var_jax.stages.generator import GeneratorStage

  config.model.classes = config.model.classes or source.num_classes
  if config.model.classes < source.num_classes:
    raise UserError(f'model.classes is {config.model.classes}, but the data has {source.num_classes} classes: set it to 0')
  tokenizer, params, fingerprint = workdir_lib.adopt_tokenizer(workdir, config.tokenizer, say)
  generator = workdir_lib.make_generator(config, tokenizer)
  return GeneratorStage(config, generator, tokenizer, params, fingerprint, steps)
