"""Bad input: one line that says what to do, exit status 2, no traceback, and nothing overwritten or lost."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT, train_both, truncate

import var_jax
from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.training.checkpoint import Checkpoints


class Places:
  """Where the tests find and put things: exp, tok, gen, digits (an experiment and trained workdirs), tmp, new, out."""

  def __init__(self, trained, tmp_path):
    self.exp, self.tok, self.gen = trained
    self.tmp, self.new, self.out = tmp_path, tmp_path / 'new', tmp_path / 'x.npz'
    self.digits = ROOT / 'experiments' / 'digits.py'

  def copy(self, workdir):
    """A copy of a trained workdir, to be spoiled."""
    return shutil.copytree(workdir, self.tmp / 'copy')


@pytest.fixture
def at(tmp_path_factory, tmp_path):
  return Places(train_both(tmp_path_factory), tmp_path)


@pytest.fixture
def refused(capfd):
  """refused(words, *arguments): runs a command, which must fail as bad input does; returns its one line."""

  def refused(words, *arguments, notes=None):
    capfd.readouterr()
    try:
      status = main([str(a) for a in arguments])
    except (Exception, SystemExit) as error:  # shown without its traceback, which can be many pages long
      pytest.fail(f'a person would see a traceback of {type(error).__name__}: {str(error)[:300]}', pytrace=False)
    out, err = capfd.readouterr()
    *before, last = err.splitlines() or ['']
    assert status == 2, err
    assert re.match(r'error: \S', last) and 'Traceback' not in err and len(last) < 600
    assert re.search(words, last), last
    if notes is None:
      assert before == [] and out == ''
    else:
      assert re.search(notes, out + err), out + err
    return last

  return refused


def snapshot(folder):
  """{path: content's hash} of everything below a folder."""
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder'
          for p in folder.rglob('*')}


def image(file, size=(8, 8)):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
  return file


# --- command lines that can be refused before anything is read or written --------------------------------------------

TRAIN = ['train', '--config={exp}:tokenizer', '--workdir={new}']
TRAIN_GENERATOR = ['train', '--config={exp}:generator', '--workdir={new}', '--config.tokenizer={tok}']
SAMPLE = ['sample', '--workdir={gen}', '--out={out}']

COMMAND_LINES = {
    'unknown_verb': ('trian.*train.*sample', ['trian']),
    'unknown_flag_of_sample': ('lables', [*SAMPLE, '--lables=1']),
    'unknown_flag_of_train': ('batchsize', [*TRAIN, '--batchsize=3']),
    'shortened_flag': ('--lab', [*SAMPLE, '--lab=1']),
    'stray_word': ('please', [*SAMPLE, 'please']),
    'stray_word_of_train': ('please', [*TRAIN, 'please']),
    'train_without_workdir': ('--workdir', ['train', '--config={exp}:tokenizer']),
    'train_without_config': ('--config', ['train', '--workdir={new}']),
    'sample_without_workdir': ('--workdir', ['sample', '--out={out}']),
    'sample_without_out': ('--out', ['sample', '--workdir={gen}']),
    'no_such_experiment': ('nope.py.*experiments', ['train', '--config=nope.py:tokenizer', '--workdir={new}']),
    'unknown_stage': ('decoder.*tokenizer.*generator', ['train', '--config={exp}:decoder', '--workdir={new}']),
    'unknown_option': ('dept.*depth', ['train', '--config={exp}:generator,dept=3', '--workdir={new}']),
    'option_of_another_type': ('depth.*int', ['train', '--config={exp}:generator,depth=deep', '--workdir={new}']),
    'unknown_option_of_digits': ('fast', ['train', '--config={digits}:tokenizer,fast', '--workdir={new}']),
    'unknown_config_key': ('peak_rl', [*TRAIN, '--config.optimizer.peak_rl=1']),
    'unknown_config_section': ('optimiser', [*TRAIN, '--config.optimiser.peak_lr=1']),
    'key_of_the_other_stage': ('label_drop', [*TRAIN, '--config.label_drop=0']),
    'word_for_a_number': ('batch_size.*many|many.*batch_size', [*TRAIN, '--config.batch_size=many']),
    'fraction_for_a_whole_number': ('batch_size', [*TRAIN, '--config.batch_size=1.5']),
    'config_flag_without_value': ('steps', [*TRAIN, '--config.steps']),
    'dash_in_a_setting': ("no such setting: 'batch-size'.*did you mean batch_size", [*TRAIN, '--config.batch-size=3']),
    'setting_without_its_section': ('did you mean optimizer.peak_lr', [*TRAIN, '--config.peak_lr=1']),
    'setting_without_a_name': ('no such setting', [*TRAIN, '--config.=1']),
    'setting_within_a_number': ('no such setting', [*TRAIN, '--config.batch_size.x=1']),
    'section_replaced': ('optimizer is a section', [*TRAIN, '--config.optimizer={{}}']),
    'section_replaced_by_another': ('mesh is a section', [*TRAIN, '--config.mesh={{"data":1}}']),
    'stage_as_a_setting': ('FILE.py:generator', [*TRAIN, '--config.stage=generator']),
    'empty_number': ('batch_size.*whole number.*batch_size=8', [*TRAIN, '--config.batch_size=']),
    'whole_number_as_a_power': ('steps.*1e3.*whole number', [*TRAIN, '--config.steps=1e3']),
    'whole_number_beyond_all_use': ('batch_size', [*TRAIN, f'--config.batch_size={10**30}']),
    'setting_that_is_not_a_number': ('peak_lr.*nan', [*TRAIN, '--config.optimizer.peak_lr=nan']),
    'setting_that_is_infinite': ('clip.*inf', [*TRAIN, '--config.optimizer.clip=inf']),
    'neither_true_nor_false': ('flip.*maybe.*true or false', [*TRAIN, '--config.data.flip=maybe']),
    'word_for_a_list': ('scales.*abc.*list', [*TRAIN, '--config.model.scales=abc']),
    'nothing_for_a_list': ('scales.*list', [*TRAIN, '--config.model.scales=']),
    'fractions_for_whole_numbers': ('scales.*2.5.*whole numbers', [*TRAIN, '--config.model.scales=(1,2.5,4)']),
    'words_in_a_list': ('betas.*numbers', [*TRAIN, '--config.optimizer.betas=("a",0.9)']),
    'nearly_a_flag': ('did you mean --labels', [*SAMPLE, '--lables=1']),
    'dash_in_a_flag': ('did you mean --batch_size', [*SAMPLE, '--batch-size=1']),
    'setting_of_a_verb_without_settings': ('config.steps', [*SAMPLE, '--config.steps=1']),
    'nearly_a_verb': ('did you mean sample', ['smaple']),
    'nearly_an_experiment': ('did you mean digits.py', ['train', '--config=experiments/digit.py', '--workdir={new}']),
    'folder_for_an_experiment': ('is a folder', ['train', '--config={tmp}', '--workdir={new}']),
    'workdir_in_a_bucket': ('--workdir: gs://b/run.*not read yet', [*TRAIN[:2], '--workdir=gs://b/run']),
    'output_in_a_bucket': ('--out: s3://b/x.npz.*not read yet', [*SAMPLE[:2], '--out=s3://b/x.npz']),
    'data_on_the_web': ('data.path: https://.*not read yet', [*TRAIN, '--config.data.path=https://x.org/y']),
    'home_of_nobody': ('no user', [*TRAIN[:2], '--workdir=~no-such-user/run']),
    'name_that_is_too_long': ('too long', [*TRAIN[:2], f'--workdir={"x" * 300}']),
    'line_break_in_a_value': ('dtype', [*TRAIN, '--config.dtype=float\n32']),
    'line_break_in_a_setting': ('no such setting', [*TRAIN, '--config.a\nb=3']),
    'last_scale_is_not_the_latent': ('3x3.*4x4.*model.scales', [*TRAIN, '--config.model.scales=(1,2,3)']),
    'image_of_another_size': ('4x4.*8x8', [*TRAIN, '--config.image_size=(16,16)']),
    'image_no_multiple_of_the_stride': ('image_size', [*TRAIN, '--config.image_size=(9,9)']),
    'scales_from_fine_to_coarse': ('coarse to fine', [*TRAIN, '--config.model.scales=(4,2,1)']),
    'scale_of_nothing': ('1x1', [*TRAIN, '--config.model.scales=(0,4)']),
    'scales_beyond_counting': ('more tokens', [*TRAIN, '--config.model.scales=(1,99999999)']),
    'no_scales': ('scales', [*TRAIN, '--config.model.scales=()']),
    'scales_in_words': ('scales', [*TRAIN, '--config.model.scales=("a",4)']),
    'batch_that_devices_cannot_share': ('batch_size 12.*8 devices.*multiple of 8', [*TRAIN, '--config.batch_size=12']),
    'batch_that_slices_cannot_share': ('batch_size 8.*accumulate=2.*16', [*TRAIN, '--config.accumulate=2']),
    'empty_batch': ('batch_size', [*TRAIN, '--config.batch_size=0']),
    'no_slices': ('accumulate', [*TRAIN, '--config.accumulate=0']),
    'unknown_data': ('webdataset.*digits.*folder', [*TRAIN, '--config.data.source=webdataset']),
    'missing_data': ('nowhere', [*TRAIN, '--config.data.source=folder', '--config.data.path={tmp}/nowhere']),
    'data_without_path': ('path', [*TRAIN, '--config.data.source=folder']),
    'crop_larger_than_the_image': ('enlarge', [*TRAIN, '--config.data.enlarge=0.5']),
    'negative_workers': ('workers', [*TRAIN, '--config.data.workers=-1']),
    'unknown_schedule': ('linear.*lin0', [*TRAIN, '--config.optimizer.schedule=linear']),
    'unknown_dtype': ('float16.*bfloat16', [*TRAIN, '--config.dtype=float16']),
    'negative_steps': ('steps', [*TRAIN, '--config.steps=-5']),
    'negative_steps_with_epochs': ('steps', [*TRAIN, '--config.steps=-5', '--config.epochs=1.0']),
    'negative_epochs': ('epochs', [*TRAIN, '--config.steps=0', '--config.epochs=-1.0']),
    'negative_seed': ('seed', [*TRAIN, '--config.seed=-1']),
    'average_that_never_moves': ('ema', [*TRAIN, '--config.ema=1.0']),
    'no_checkpoint_to_keep': ('keep', [*TRAIN, '--config.keep=0']),
    'no_codes': ('codes', [*TRAIN, '--config.model.codes=0']),
    'no_channels': ('ch', [*TRAIN, '--config.model.ch=0']),
    'share_above_one': ('scale_dropout', [*TRAIN, '--config.codebook.scale_dropout=1.5']),
    'lpips_without_weights': ('lpips_weights', [*TRAIN, '--config.loss.lpips=1.0']),
    'lpips_weights_missing': (
        'vgg.npz', [*TRAIN, '--config.loss.lpips=1.0', '--config.loss.lpips_weights={tmp}/vgg.npz']),
    'generator_without_tokenizer': ('--config.tokenizer', ['train', '--config={exp}:generator', '--workdir={new}']),
    'attention_of_other_devices': ('needs a tpu.*auto', [*TRAIN_GENERATOR, '--config.attention=splash']),
    'tokenizer_that_is_no_workdir': ('config.json', [*TRAIN_GENERATOR[:3], '--config.tokenizer={tmp}']),
    'tokenizer_that_is_missing': ('nowhere', [*TRAIN_GENERATOR[:3], '--config.tokenizer={tmp}/nowhere']),
    'width_not_shared_by_heads': ('heads', [*TRAIN_GENERATOR, '--config.model.heads=5']),
    'fewer_classes_than_the_data': ('classes', [*TRAIN_GENERATOR, '--config.model.classes=3']),
    'no_blocks': ('depth', [*TRAIN_GENERATOR, '--config.model.depth=0']),
    'labels_dropped_above_one': ('label_drop', [*TRAIN_GENERATOR, '--config.label_drop=2.0']),
    'all_paths_dropped': ('drop_path', [*TRAIN_GENERATOR, '--config.drop_path=1.0']),
    'label_too_large': ('label 10.*0 to 9', [*SAMPLE, '--labels=3,10']),
    'label_negative': ('label -1.*0 to 9', [*SAMPLE, '--labels=-1']),
    'label_in_words': ('labels.*whole numbers', [*SAMPLE, '--labels=a']),
    'no_label': ('labels', [*SAMPLE, '--labels=']),
    'no_images': ('num', [*SAMPLE, '--num=0']),
    'number_in_words': ('num', [*SAMPLE, '--num=many']),
    'top_p_above_one': ('top_p', [*SAMPLE, '--top_p=1.5']),
    'top_p_negative': ('top_p', [*SAMPLE, '--top_p=-0.1']),
    'top_k_negative': ('top_k', [*SAMPLE, '--top_k=-1']),
    'temperature_zero': ('temperature', [*SAMPLE, '--temperature=0']),
    'temperature_not_a_number': ('temperature', [*SAMPLE, '--temperature=nan']),
    'guidance_not_a_number': ('cfg', [*SAMPLE, '--cfg=nan']),
    'sampling_seed_negative': ('seed', [*SAMPLE, '--seed=-1']),
    'sampling_seed_too_large': ('seed', [*SAMPLE, f'--seed={2**40}']),
    'empty_sampling_batch': ('batch_size', [*SAMPLE, '--batch_size=0']),
    'sample_from_a_tokenizer': ('tokenizer.*generator', ['sample', '--workdir={tok}', '--out={out}']),
    'labels_for_a_tokenizer': ('tokenizer.*generator', ['sample', '--workdir={tok}', '--labels=1', '--out={out}']),
    'sample_from_no_workdir': ('config.json', ['sample', '--workdir={tmp}', '--out={out}']),
    'sample_from_nowhere': ('nowhere', ['sample', '--workdir={tmp}/nowhere', '--out={out}']),
    'sample_out_of_unknown_kind': ('gif.*png', ['sample', '--workdir={gen}', '--out={tmp}/x.gif']),
    'sample_out_below_a_file': ('cannot write|--out', ['sample', '--workdir={gen}', '--out={exp}/x.png']),
    'sample_out_in_proc': ('cannot write', ['sample', '--workdir={gen}', '--out=/proc/nowhere/x.png']),
    'sample_out_is_a_file': ('--out', ['sample', '--workdir={gen}', '--out={tmp}/plain']),
    'sample_out_is_a_folder': ('--out', ['sample', '--workdir={gen}', '--out={tmp}/folder.png']),
    'reconstruct_without_images': ('--images', ['reconstruct', '--workdir={tok}', '--out={out}']),
    'reconstruct_missing_image': (
        'nope.png', ['reconstruct', '--workdir={tok}', '--images={tmp}/nope.png', '--out={out}']),
    'reconstruct_text': ('text.png', ['reconstruct', '--workdir={tok}', '--images={tmp}/text.png', '--out={out}']),
    'reconstruct_folder': ('text.png', ['reconstruct', '--workdir={tok}', '--images={tmp}', '--out={out}']),
    'reconstruct_no_workdir': (
        'config.json', ['reconstruct', '--workdir={tmp}', '--images={tmp}/a.png', '--out={out}']),
}


@pytest.mark.parametrize('name', COMMAND_LINES)
def test_bad_command_line_is_refused_in_one_line(name, at, refused):
  words, command = COMMAND_LINES[name]
  (at.tmp / 'text.png').write_text('no picture')
  (at.tmp / 'plain').write_text('mine')
  (at.tmp / 'folder.png').mkdir()
  image(at.tmp / 'a.png')
  before = [snapshot(folder) for folder in (at.tmp, at.tok, at.gen, at.exp.parent)]
  refused(words, *(part.format(**vars(at)) for part in command))
  assert [snapshot(folder) for folder in (at.tmp, at.tok, at.gen, at.exp.parent)] == before


# --- experiments and data --------------------------------------------------------------------------------------------

EXPERIMENTS = {
    'syntax_error': ('def get_config(:\n', 'bad.py'),
    'without_get_config': ('x = 1\n', 'get_config'),
    'that_raises': ('def get_config(argument):\n  raise ValueError("no\\nway")\n', 'no'),
    'that_imports_what_is_missing': ('import no_such_package\n', 'no_such_package'),
    'that_gives_no_config': ('def get_config(argument):\n  return 3\n', 'bad.py|config'),
    'with_a_key_that_does_not_exist': (
        'from var_jax import configs\n\n\ndef get_config(argument):\n  config = configs.tokenizer()\n'
        '  config.optimizer.lock()\n  config.optimizer.peak_rl = 1\n  return config\n', 'peak_rl'),
    'empty': ('', 'get_config'),
    'of_no_stage': (
        'from var_jax import configs\n\n\ndef get_config(argument):\n  config = configs.tokenizer()\n'
        '  config.stage = "video"\n  return config\n', 'tokenizer or generator'),
    'that_lacks_settings': (
        'from var_jax import configs\n\n\ndef get_config(argument):\n  config = configs.tokenizer()\n'
        '  del config.optimizer.clip\n  return config\n', 'without optimizer.clip'),
    'that_leaves': ('import sys\n\n\ndef get_config(argument):\n  sys.exit(3)\n', 'SystemExit'),
    'with_a_nul_byte': ('x = "\0"\n', 'bad.py'),
}


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_broken_experiment_is_refused_in_one_line(name, at, refused, monkeypatch):
  for module in [m for m in sys.modules if m.endswith('config_config')]:
    monkeypatch.delitem(sys.modules, module)  # ml_collections reads every experiment into the same module
  text, words = EXPERIMENTS[name]
  (at.tmp / 'bad.py').write_text(text)
  refused(words, 'train', f'--config={at.tmp}/bad.py:tokenizer', f'--workdir={at.new}')
  assert not at.new.exists()


def folder_without_images(root):
  (root / 'train' / 'cats').mkdir(parents=True)
  (root / 'train' / 'cats' / 'notes.txt').write_text('none yet')


def folder_with_an_empty_class(root):
  for i in range(3):
    image(root / 'train' / 'cats' / f'{i}.png')
  (root / 'train' / 'dogs').mkdir()


def folder_without_classes(root):
  image(root / 'train' / 'a.png')


def folder_of_broken_images(root):
  for i in range(30):
    (root / 'train' / 'cats').mkdir(parents=True, exist_ok=True)
    (root / 'train' / 'cats' / f'{i}.png').write_bytes(b'\x89PNG\r\n\x1a\n cut')


FOLDERS = {
    folder_without_images: 'no images.*cats', folder_with_an_empty_class: 'no images.*dogs',
    folder_without_classes: 'class'}


@pytest.mark.parametrize('build', FOLDERS, ids=lambda build: build.__name__)
def test_unusable_folder_is_refused_in_one_line(build, at, refused):
  build(at.tmp / 'photos')
  before = snapshot(at.tmp)
  refused(FOLDERS[build], 'train', f'--config={at.exp}:tokenizer', f'--workdir={at.new}', '--config.data.source=folder',
          f'--config.data.path={at.tmp / "photos"}')
  assert snapshot(at.tmp) == before


def test_folder_of_broken_images_ends_the_run_with_one_line(at, refused):
  folder_of_broken_images(at.tmp / 'photos')
  refused('unreadable', 'train', f'--config={at.exp}:tokenizer', f'--workdir={at.new}', '--config.data.source=folder',
          f'--config.data.path={at.tmp / "photos"}', notes='0/8')


# --- workdirs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('change', ['model.codes=64', 'batch_size=16', 'optimizer.peak_lr=0.5', 'seed=1', 'ema=0.0'])
def test_resuming_with_other_settings_is_refused(change, at, refused):
  before = snapshot(at.tok)
  name = change.partition('=')[0]
  refused(f'other settings.*{name}', 'train', f'--config={at.exp}:tokenizer', f'--workdir={at.tok}', '--config.steps=4',
          '--config.eval_every=4', '--config.pictures_every=4', f'--config.{change}')
  assert snapshot(at.tok) == before


def test_another_stage_in_the_same_workdir_is_refused(at, refused):
  before = snapshot(at.tok)
  refused('other settings.*--workdir', 'train', f'--config={at.exp}:generator', f'--workdir={at.tok}',
          f'--config.tokenizer={at.tok}')
  assert snapshot(at.tok) == before


def other_tokenizer(at, target):
  """A tokenizer's workdir with other parameters."""
  _, params = workdir_lib.load_tokenizer(at.tok, say=lambda text: None)
  params['quantizer']['codebook'] = params['quantizer']['codebook'] + 0.1
  target.mkdir(exist_ok=True)
  shutil.copy(at.tok / 'config.json', target)
  shutil.rmtree(target / 'checkpoints', ignore_errors=True)
  with Checkpoints(target) as checkpoints:
    checkpoints.save_model(4, params, {})
  return target


def test_resuming_with_another_tokenizer_is_refused(at, refused):
  other, workdir = other_tokenizer(at, at.tmp / 'other'), at.copy(at.gen)
  before = snapshot(workdir)
  refused('fingerprint.*wanted.*--config.tokenizer', 'train', f'--config={at.exp}:generator', f'--workdir={workdir}',
          f'--config.tokenizer={other}', '--config.steps=8')
  assert snapshot(workdir) == before


def test_exchanged_copy_of_the_tokenizer_is_refused(at, refused):
  workdir = at.copy(at.gen)
  other_tokenizer(at, workdir / 'tokenizer')
  before = snapshot(workdir)
  refused('fingerprint.*wanted', 'sample', f'--workdir={workdir}', f'--out={at.out}')
  refused('fingerprint', 'train', f'--config={at.exp}:generator', f'--workdir={workdir}', '--config.steps=8')
  assert snapshot(workdir) == before and not at.out.exists()


@pytest.mark.parametrize(
    'text', ['{"stage": "tok', '', '{}', '[]', '{"stage": "tokenizer"}', '{"stage": "video"}', b'\xff\xfe'])
@pytest.mark.parametrize('verb', ['sample', 'train'])
def test_spoiled_config_is_refused(text, verb, at, refused):
  workdir = at.copy(at.gen)
  (workdir / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
  before = snapshot(workdir)
  if verb == 'sample':
    refused('config.json|stage', 'sample', f'--workdir={workdir}', f'--out={at.out}')
  else:
    refused('config.json|settings', 'train', f'--config={at.exp}:generator', f'--workdir={workdir}', '--config.steps=8')
  assert snapshot(workdir) == before and not at.out.exists()


@pytest.mark.parametrize('what', ['config.json', 'metrics.jsonl', 'checkpoints', 'tensorboard'])
def test_file_in_place_of_a_folder_and_the_reverse_are_refused(what, at, refused):
  path = at.copy(at.tok) / what
  if path.is_dir():
    shutil.rmtree(path)
    path.write_text('mine')
  else:
    path.unlink()
    path.mkdir()
  refused(what, 'train', f'--config={at.exp}:tokenizer', f'--workdir={path.parent}', '--config.steps=6', notes='')


def test_workdir_that_is_a_file_is_refused(at, refused):
  (at.tmp / 'file').write_text('mine')
  refused('file', 'train', f'--config={at.exp}:tokenizer', f'--workdir={at.tmp / "file"}')
  refused('file', 'sample', f'--workdir={at.tmp / "file"}', f'--out={at.out}')
  assert (at.tmp / 'file').read_text() == 'mine'


def test_workdir_that_cannot_be_made_is_refused(at, refused):
  refused('/proc/nowhere', 'train', f'--config={at.exp}:tokenizer', '--workdir=/proc/nowhere/run')


@pytest.mark.parametrize('what', ['checkpoints', 'tokenizer'])
def test_missing_part_of_a_workdir_is_named(what, at, refused):
  workdir = at.copy(at.gen)
  shutil.rmtree(workdir / what)
  before = snapshot(workdir)
  refused({'checkpoints': 'no checkpoint', 'tokenizer': 'tokenizer'}[what], 'sample', f'--workdir={workdir}',
          f'--out={at.out}')
  assert snapshot(workdir) == before and not at.out.exists()


def test_empty_folder_of_checkpoints_is_refused(at, refused):
  workdir = at.copy(at.gen)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  refused('no checkpoint', 'sample', f'--workdir={workdir}', f'--out={at.out}')


def test_half_written_checkpoint_without_another_is_refused_and_left(at, refused):
  workdir = at.copy(at.gen)
  truncate(workdir / 'checkpoints' / '4')
  before = snapshot(workdir)
  for arguments in (['sample', f'--workdir={workdir}', f'--out={at.out}'],
                    ['train', f'--config={at.exp}:generator', f'--workdir={workdir}', '--config.steps=8']):
    refused('none of the checkpoints.*can be read.*restore', *arguments, notes='checkpoint 4 .*cannot be read')
    assert {name: value for name, value in snapshot(workdir).items() if name in before} | {
        'config.json': before['config.json']} == before
  assert not at.out.exists()


def test_half_written_checkpoint_gives_way_to_the_last_good_one(at, capfd):
  workdir = at.copy(at.gen)
  shutil.copytree(workdir / 'checkpoints' / '4', workdir / 'checkpoints' / '6')
  truncate(workdir / 'checkpoints' / '6')
  assert main(['sample', f'--workdir={workdir}', '--num=1', f'--out={at.out}']) == 0
  out, err = capfd.readouterr()
  said = (out + err).splitlines()
  assert any('checkpoint 6' in line and 'cannot be read' in line for line in said)
  assert any('using checkpoint 4' in line for line in said)
  assert at.out.exists()


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
  folder.mkdir()
  if os.geteuid() or subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True).returncode:
    pytest.skip('mounting a small disk takes root')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', folder], check=True)


def fill(folder, left):
  """Leaves so many bytes on a disk."""
  stat = os.statvfs(folder)
  (folder / 'ballast').write_bytes(bytes(max(stat.f_bavail * stat.f_frsize - left, 0)))


@pytest.mark.parametrize('left', [100_000, 0])
def test_full_disk_while_saving_loses_nothing(left, at, refused):
  with small_disk(at.tmp / 'disk', '16m') as disk:
    workdir = shutil.copytree(at.gen, disk / 'run')
    checkpoint = snapshot(workdir / 'checkpoints')
    config = (workdir / 'config.json').read_text()
    fill(disk, left)
    resume = ['train', f'--config={at.exp}:generator', f'--workdir={workdir}', '--config.steps=6',
              '--config.eval_every=4', '--config.pictures_every=4']
    refused('No space left|full|free some space', *resume, notes='error')
    assert {k: v for k, v in snapshot(workdir / 'checkpoints').items() if k.split('/')[0] == '4'} == checkpoint
    assert var_jax.load(workdir).sample([1]).images.shape == (1, 8, 8, 3)
    assert (workdir / 'config.json').read_text() == config or left
    (disk / 'ballast').unlink()
    assert main(resume) == 0  # and once there is space again the run goes on
    assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['4', '6']


def test_full_disk_while_exporting_leaves_nothing_half_written(at, refused):
  """What is there would be in the way of the next try."""
  with small_disk(at.tmp / 'disk', '64k') as disk:
    refused('No space left', 'export', f'--workdir={at.tok}', f'--out={disk / "out"}', '--platforms=cpu')
    assert snapshot(disk) == {'out': 'folder'}


@pytest.mark.parametrize('name', ['x.npz', 'x.png', 'many'])
def test_full_disk_while_sampling_keeps_what_was_there(name, at, refused):
  with small_disk(at.tmp / 'disk', '1m') as disk:
    if '.' in name:
      (disk / name).write_bytes(b'earlier')
    fill(disk, 0)
    before = snapshot(disk)
    refused('No space left|free some space', 'sample', f'--workdir={at.gen}', f'--out={disk / name}', '--num=64')
    after = {path: value for path, value in snapshot(disk).items() if value != 'folder'}
    assert after.items() >= before.items()
    for path in after.keys() - before.keys():  # of many pictures the first may be there, but no half ones
      assert name == 'many' and Image.open(disk / path).size == (8, 8)
