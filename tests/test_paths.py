"""Paths mean what a person means by them, wherever they come in: flags, settings, `var_jax.load`, launch scripts."""

import pathlib
import subprocess
import sys

import pytest
from tiny_runs import ROOT, SHORT, train_both

import var_jax
from var_jax import paths
from var_jax.__main__ import VERBS, main
from var_jax.commands import experiment, flags
from var_jax.errors import UserError

DIGITS = ROOT / 'experiments/digits.py'


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The home folder, which is the current one as well: a folder named ~ would be seen there."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('text, path', [
    ('~/run', '{home}/run'), ('~', '{home}'), ('~root/x', '/root/x'), ('runs/x', 'runs/x'), ('a~/b', 'a~/b'),
    ('./~/x', './~/x'), ('file:///a/b%20c', '/a/b c'), ('file://localhost/a', '/a'), ('file:/a', '/a'),
    ('folder:/a', 'folder:/a'), (pathlib.Path('~/run'), '{home}/run'), (b'~/run', '{home}/run')])
def test_local_paths_are_what_a_person_means(home, text, path):
  assert paths.local(text) == path.format(home=home)


@pytest.mark.parametrize('text, words', [
    ('gs://b/run', 'gs://'), ('S3://b/run', 's3://'), ('hf://u/m', 'hf://'), ('https://x.org/a', 'https://'),
    (pathlib.Path('gs://b/run'), 'gs://'), ('memory://x', 'memory://'), ('file://host/a', 'file:///PATH'),
    ('~nobody-of-that-name/x', 'no user'), ('a\0b', 'NUL'), ('x' * 256, 'too long'), ('x/' * 2100, 'too long'),
    (3, 'no path'), (None, 'no path')])
def test_what_is_no_path_of_this_machine_is_refused(home, text, words):
  with pytest.raises(UserError, match=words) as error:
    paths.local(text)
  assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_every_flag_for_a_path_is_known_as_one(monkeypatch):
  """By what its metavar looks like: a new flag of that look is read like all the others."""
  found = set()
  monkeypatch.setattr(flags.Parser, 'parse_known_args', lambda self, arguments=None, namespace=None: seen(self))

  def seen(parser):
    found.update(action.dest for action in parser._actions if flags.PATH.match(str(action.metavar)))
    raise SystemExit

  for verb in VERBS:
    with pytest.raises(SystemExit):
      main([verb])
  assert found >= {'workdir', 'out', 'config', 'images', 'tokens', 'image', 'mask', 'data', 'samples', 'reference',
                   'weights', 'lpips_weights', 'classifier', 'tokenizer', 'generator', 'to_torch'}
  assert not found & {'labels', 'num', 'box', 'distributed', 'grid', 'platforms', 'patch_nums', 'unused'}


@pytest.mark.parametrize('flag, value, read', [
    ('--data', 'folder:~/photos', 'folder:{home}/photos'), ('--data', '~/photos', '{home}/photos'),
    ('--images', '~/a.png,b.png,~/c', '{home}/a.png,b.png,{home}/c'), ('--out', '~/x.npz', '{home}/x.npz'),
    ('--config', '~/e.py:generator,depth=~', '{home}/e.py:generator,depth=~'), ('--workdir', '~/t', '{home}/t')])
def test_paths_within_flags_are_read_as_well(home, flag, value, read):
  parser = flags.Parser('test', '', '')
  for name, shape in (('--data', '[KIND:]PATH'), ('--images', 'FILE|DIR,...'), ('--out', 'X.png|X.npz|DIR'),
                      ('--config', 'FILE.py[:ARG]'), ('--workdir', 'DIR')):
    parser.add_argument(name, metavar=shape)
  options = parser.parse_args([f'{flag}={value}'])
  assert getattr(options, flag[2:]) == read.format(home=home)
  with pytest.raises(UserError, match=f'^{flag}: .*gs://'):
    parser.parse_args([f'{flag}=gs://bucket/x'])


def test_a_file_with_a_comma_is_one_file(home):
  (home / 'a,b.jpg').touch()
  assert paths.locals_of('a,b.jpg') == 'a,b.jpg' and paths.locals_of('~/a,~/b') == f'{home}/a,{home}/b'


@pytest.mark.parametrize('name', (*experiment.PATHS, *experiment.PATH_LISTS))
def test_settings_that_are_paths_are_read_like_flags(home, name):
  file = f'{DIGITS}:{"tokenizer" if name.startswith("loss.") else "generator"}'
  config = flags.read_config(file, [f'--config.{name}=~/x'])
  for part in name.split('.'):
    config = config[part]
  assert config == f'{home}/x'
  with pytest.raises(UserError, match=f'--config.{name}: .*s3://'):
    flags.read_config(file, [f'--config.{name}=s3://b/x'])


def test_home_is_found_by_the_commands_and_by_load(home, tmp_path_factory):
  """And no folder named ~ or gs: is left in the current one."""
  experiment_file, tokenizer, _ = train_both(tmp_path_factory)
  (home / 'tok').symlink_to(tokenizer)
  command = ['train', f'--config={experiment_file}:tokenizer', *SHORT]
  assert main([*command, '--workdir=~/tok']) == 0
  assert main(['reconstruct', '--workdir=~/tok', '--held_out=1', '--out=~/x.npz']) == 0
  assert var_jax.load('~/tok').tokenizer == var_jax.load(tokenizer).tokenizer
  assert main([*command, '--workdir=gs://b/run']) == 2
  with pytest.raises(UserError, match='gs://'):
    var_jax.load('gs://b/run')
  assert sorted(p.name for p in home.iterdir()) == ['tok', 'x.npz']


# --- experiments, from wherever a command is called ------------------------------------------------------------------


def test_own_experiments_are_found_from_any_folder(home, capsys):
  config = flags.read_config('experiments/digits.py:tokenizer', [])
  assert config.image_size == (16, 16) and f'taking {DIGITS}' in capsys.readouterr().err
  for name, words in (('experiments/digts.py', 'did you mean digits.py'), ('digits.py', 'no experiment'),
                      (str(ROOT / 'experiments'), 'is a folder')):
    with pytest.raises(UserError, match=words):
      flags.read_config(name, [])


def test_experiments_import_alike_however_the_command_began(home):
  """`python -m` has the current folder to import from, `var-jax` has not: own configs build on ours with both."""
  (home / 'beside.py').write_text('CODES = 7')
  (home / 'mine.py').write_text('from experiments import folder\nimport beside\n\n\ndef get_config(argument):\n'
                                '  config = folder.get_config(argument)\n  config.model.codes = beside.CODES\n'
                                '  return config\n')
  script = 'from var_jax.commands import flags; print(flags.read_config({!r}, []).model.codes)'
  for folder, file in ((home, 'mine.py:tokenizer'), (ROOT, f'{home}/mine.py:tokenizer')):
    for python in ((), ('-P',)):  # -P: without the current folder
      out = subprocess.run([sys.executable, *python, '-c', script.format(file)], cwd=folder, capture_output=True,
                           text=True, check=False)
      assert out.stdout == '7\n', out.stderr
