"""The commands as a person types them: train both stages, sample, reconstruct; and `var_jax.load` says the same."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT, SHORT, train_both

import var_jax
from var_jax import workdir as workdir_lib
from var_jax.__main__ import VERBS, main
from var_jax import pictures as pictures_lib
from var_jax.commands import flags, labels, output, reconstruct, script
from var_jax.errors import UserError, note

EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return train_both(tmp_path_factory)


@pytest.fixture(scope='module')
def tokenizer(trained):
  return trained[1]


@pytest.fixture(scope='module')
def generator(trained):
  return trained[2]


def arrays(file):
  with np.load(file) as opened:
    return {name: opened[name] for name in opened.files}


def sample(workdir, out, *options):
  """What `var-jax sample` leaves in an .npz."""
  assert main(['sample', f'--workdir={workdir}', f'--out={out}', *options]) == 0
  return arrays(out)


@pytest.fixture(scope='module')
def five(generator, tmp_path_factory):
  """The .npz of five samples."""
  return sample(generator, tmp_path_factory.mktemp('five') / 'x.npz', '--labels=0,3,7', '--num=5', '--seed=1')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Two image files of other sizes than the model's."""
  folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
  for name, shape in (('a.png', (20, 30)), ('b.jpg', (9, 8))):
    Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / name)
  return [folder / 'a.png', folder / 'b.jpg']


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [0, 1], ids=['tokenizer', 'generator'])
def test_training_leaves_config_checkpoints_metrics_and_events(trained, stage):
  workdir = trained[1 + stage]
  config = json.loads((workdir / 'config.json').read_text())
  assert config['stage'] == ('tokenizer', 'generator')[stage] and config['steps'] == 4
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['4']
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'train/loss' in line] == [1, 2, 3, 4]
  assert all(np.isfinite(line['train/loss']) for line in lines if 'train/loss' in line)
  validation = {name for line in lines for name in line if name.startswith('validation/')}
  assert {('validation/psnr', 'validation/loss')[stage]} < validation
  assert (f'validation/{("usage", "accuracy")[stage]}/scale_2') in validation
  assert list((workdir / 'tensorboard').glob('events*'))


def test_generator_keeps_a_copy_of_its_tokenizer(tokenizer, generator):
  _, ours = workdir_lib.load_tokenizer(tokenizer)
  _, copy = workdir_lib.load_tokenizer(generator / 'tokenizer')
  assert workdir_lib.fingerprint(ours) == workdir_lib.fingerprint(copy)


def test_finished_run_says_so_and_stays(trained, capsys):
  experiment, tokenizer, generator = trained
  before = {p: p.stat().st_mtime_ns for p in tokenizer.joinpath('checkpoints').rglob('*')}
  assert main(['train', f'--config={experiment}:tokenizer', f'--workdir={tokenizer}', *SHORT]) == 0
  assert 'resuming from step 4 of 4' in capsys.readouterr().err
  assert {p: p.stat().st_mtime_ns for p in tokenizer.joinpath('checkpoints').rglob('*')} == before
  command = ['train', f'--config={experiment}:generator', f'--workdir={generator}', *SHORT]
  assert main(command) == 0  # without --config.tokenizer: it has its copy
  assert main([*command, f'--config.tokenizer={tokenizer}']) == 0  # the same one, elsewhere
  assert 'resuming from step 4 of 4' in capsys.readouterr().err


# --- sample ----------------------------------------------------------------------------------------------------------


def test_samples_have_the_layout_of_the_contract(five):
  assert five.keys() == {'arr_0', 'labels', 'tokens'}
  assert five['arr_0'].dtype == np.uint8 and five['arr_0'].shape == (5, 8, 8, 3)
  assert five['tokens'].dtype == np.int32 and five['tokens'].shape == (5, 1 + 4 + 16)
  np.testing.assert_array_equal(five['labels'], [0, 3, 7, 0, 3])
  assert len(np.unique(five['arr_0'], axis=0)) == 5  # an image each


def test_sample_without_labels_goes_through_the_classes(generator, tmp_path):
  np.testing.assert_array_equal(sample(generator, tmp_path / 'x.npz')['labels'], range(10))
  np.testing.assert_array_equal(sample(generator, tmp_path / 'x.npz', '--num=3')['labels'], range(3))
  np.testing.assert_array_equal(sample(generator, tmp_path / 'x.npz', '--labels=4')['labels'], [4])


@pytest.mark.parametrize('options', [['--num=3'], ['--num=5', '--batch_size=1'], ['--num=20', '--batch_size=16']])
def test_same_seed_gives_same_images_whatever_the_number_and_batch(generator, five, tmp_path, options):
  other = sample(generator, tmp_path / 'x.npz', '--labels=0,3,7', '--seed=1', *options)
  count = min(5, len(other['arr_0']))
  np.testing.assert_array_equal(other['tokens'][:count], five['tokens'][:count])
  np.testing.assert_array_equal(other['labels'][:count], five['labels'][:count])
  apart = np.abs(other['arr_0'][:count].astype(int) - five['arr_0'][:count])
  assert apart.max() <= 1 and apart.mean() < 0.01  # rounding of another batch's sums


def test_seed_and_filters_change_the_samples(generator, five, tmp_path):
  for options in (['--seed=2'], ['--top_k=1'], ['--cfg=9'], ['--temperature=0.001']):
    other = sample(generator, tmp_path / 'x.npz', '--labels=0,3,7', '--num=5', '--seed=1', *options)
    assert not np.array_equal(other['tokens'], five['tokens']), options
  again = sample(generator, tmp_path / 'x.npz', '--labels=0,3,7', '--num=5', '--seed=1', '--top_k=1')
  greedy = sample(generator, tmp_path / 'x.npz', '--labels=0,3,7', '--num=5', '--seed=9', '--top_k=1')
  np.testing.assert_array_equal(greedy['tokens'], again['tokens'])  # the likeliest tokens need no seed


def test_folder_and_picture_show_the_same_samples(generator, five, tmp_path):
  options = [f'--workdir={generator}', '--labels=0,3,7', '--num=5', '--seed=1']
  assert main(['sample', *options, f'--out={tmp_path / "many"}']) == 0
  files = sorted((tmp_path / 'many').iterdir())
  assert [f.name for f in files] == [f'{i:06d}.png' for i in range(5)]
  np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), five['arr_0'])
  assert main(['sample', *options, f'--out={tmp_path / "new" / "one.png"}']) == 0
  picture = np.asarray(Image.open(tmp_path / 'new' / 'one.png'))
  height, width = picture.shape[:2]
  zoom = 64 // 8  # small images are enlarged
  reach = zoom * 7 + 1
  corners = [(y, x) for y in range(height - reach) for x in range(width - reach)]
  tiles = {picture[y:y + reach:zoom, x:x + reach:zoom].tobytes() for y, x in corners}
  assert all(image.tobytes() in tiles for image in five['arr_0'])


# --- reconstruct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [1, 2], ids=['tokenizer', 'generator'])
def test_reconstruction_shows_every_scale(trained, pictures, tmp_path, stage):
  command = ['reconstruct', f'--workdir={trained[stage]}', f'--images={",".join(map(str, pictures))}']
  assert main([*command, f'--out={tmp_path / "x.npz"}']) == 0
  out = arrays(tmp_path / 'x.npz')
  assert out.keys() == {'arr_0', 'tokens', 'scales'}
  assert out['arr_0'].shape == (2, 8, 8, 3) and out['scales'].shape == (2, 3, 8, 8, 3)
  assert out['tokens'].shape == (2, 21) and out['tokens'].dtype == np.int32
  assert out['arr_0'].dtype == out['scales'].dtype == np.uint8
  np.testing.assert_array_equal(out['scales'][:, -1], out['arr_0'])
  assert not np.array_equal(out['scales'][:, 0], out['scales'][:, 1])
  model = var_jax.load(trained[stage])
  np.testing.assert_array_equal(model.decode(out['tokens']), out['arr_0'])
  np.testing.assert_array_equal(model.decode_every_scale(out['tokens']), out['scales'])
  assert main([*command, f'--out={tmp_path / "x.png"}']) == 0
  assert min(Image.open(tmp_path / 'x.png').size) >= 16


def test_reconstruction_of_held_out_images_needs_no_files(tokenizer, tmp_path):
  assert main(['reconstruct', f'--workdir={tokenizer}', '--held_out=3', f'--out={tmp_path / "x.npz"}']) == 0
  assert arrays(tmp_path / 'x.npz')['scales'].shape == (3, 3, 8, 8, 3)


# --- var_jax.load ----------------------------------------------------------------------------------------------------


def test_loaded_model_agrees_with_the_commands(generator, tokenizer, five, pictures, tmp_path):
  model = var_jax.load(str(generator))
  images, labels, tokens = model.sample([0, 3, 7, 0, 3], seed=1)
  np.testing.assert_array_equal(tokens, five['tokens'])
  np.testing.assert_array_equal(images, five['arr_0'])
  np.testing.assert_array_equal(labels, five['labels'])
  np.testing.assert_array_equal(model.sample([7, 0], seed=1, first=2).tokens, tokens[2:4])
  decoded = model.decode(tokens)
  assert np.abs(decoded.astype(int) - images).max() <= 1
  pixels = np.stack([np.asarray(Image.open(pictures[0]).convert('RGB').crop((0, 0, 8, 8)))])
  codes = model.encode(pixels)
  assert codes.dtype == np.int32 and codes.shape == (1, 21)
  np.testing.assert_array_equal(codes, model.encode(pixels / np.float32(127.5) - 1))
  np.testing.assert_array_equal(codes, var_jax.load(tokenizer).encode(pixels))


def test_saving_memory_changes_little(generator, five, tmp_path):
  out = tmp_path / 'few.npz'
  assert main(['sample', f'--workdir={generator}', '--labels=0,3,7,0,3', '--seed=1', '--low_memory',
               f'--out={out}']) == 0
  few = arrays(out)
  np.testing.assert_array_equal(few['tokens'], five['tokens'])
  assert np.abs(few['arr_0'].astype(int) - five['arr_0']).max() <= 1
  half, whole = (var_jax.load(generator, bfloat16=on) for on in (True, False))
  kernel = lambda model: model.params['generator']['blocks']['fc1']['kernel']
  assert kernel(half).nbytes == kernel(whole).nbytes / 2 and half.identity != whole.identity
  tokens = half.sample([0, 3, 7, 0, 3], seed=1).tokens
  assert 0.5 < np.mean(tokens == five['tokens']) <= 1  # of rounded kernels, most of the same


def test_loaded_model_refuses_what_does_not_fit(generator, tokenizer):
  model = var_jax.load(generator)
  for call in (lambda: model.sample([10]), lambda: model.sample([-1]), lambda: model.sample([0.5]),
               lambda: model.sample([]), lambda: model.sample([0], top_p=2), lambda: model.decode([[0] * 20]),
               lambda: model.decode([[32] * 21]), lambda: model.encode(np.zeros((1, 9, 8, 3), np.uint8)),
               lambda: var_jax.load(tokenizer).sample([0])):
    with pytest.raises(UserError):
      call()


@pytest.fixture(scope='module')
def model(generator):
  return var_jax.load(generator)


class Tensor:
  """As those of other libraries: an array with methods in place of attributes."""

  def __init__(self, values):
    self.values = np.asarray(values)
    self.shape = self.values.shape

  def __array__(self, dtype=None, copy=None):
    return self.values

  def size(self):
    return self.shape

  def item(self):
    return self.values.item()


def test_model_takes_numbers_and_arrays_of_any_library(model):
  tokens = model.sample([1, 2, 3], seed=2, top_k=0, top_p=0).tokens
  for same in (model.sample(Tensor([1, 2, 3]), Tensor(2), top_k=None, top_p=None),
               model.sample(np.uint8([1, 2, 3]), np.int64(2), top_k=0.0, top_p=np.float32(0), batch_size=np.int8(64))):
    np.testing.assert_array_equal(same.tokens, tokens)
  np.testing.assert_array_equal(model.decode(Tensor(tokens)), model.decode(tokens))


@pytest.mark.parametrize('wrong', [
    {'seed': None}, {'seed': 1.5}, {'seed': -1}, {'seed': 'a'}, {'seed': float('nan')}, {'cfg': [1]}, {'cfg': None},
    {'first': -1}, {'first': 2**32 - 1}, {'first': None}, {'top_k': 1.5}, {'top_k': '3'}, {'top_p': float('nan')},
    {'temperature': float('inf')}, {'temperature': None}, {'batch_size': 0}, {'batch_size': None}, {'labels': [True]},
    {'labels': ['cat']}, {'labels': [[1], [2]]}, {'labels': [[1], [2, 3]]}, {'labels': None}, {'labels': [2**63]},
    {'labels': {}}], ids=str)
def test_model_refuses_what_is_no_such_number(model, wrong):
  with pytest.raises(UserError) as error:
    model.sample(**{'labels': [0, 1]} | wrong)
  assert '\n' not in str(error.value)


def test_floats_from_0_to_1_are_told_from_those_from_minus_1(model):
  """x / 255 would pass as a bright image. White is white in both."""
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  with pytest.raises(UserError, match=r'uint8, or floats in \[-1, 1\]'):
    model.encode(pixels / 255)
  for images in (pixels.astype(int), [[1], [2, 3]], pixels > 9, None):
    with pytest.raises(UserError):
      model.encode(images)
  white = np.full((1, 8, 8, 3), 255, np.uint8)
  np.testing.assert_array_equal(model.encode(np.ones((1, 8, 8, 3))), model.encode(white))


def test_model_that_is_let_go_is_freed(generator):
  """Its programs held it, and its parameters with it."""
  model = var_jax.load(generator)
  model.sample([0])
  gone = [weakref.ref(model), *map(weakref.ref, jax.tree.leaves(model.params))]
  del model
  gc.collect()
  assert not any(reference() is not None for reference in gone)


# --- help and experiments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('verb', VERBS)
def test_help_of_every_verb_ends_in_an_example(verb, capsys):
  with pytest.raises(SystemExit) as exit:
    main([verb, '--help'])
  text = capsys.readouterr().out
  assert exit.value.code == 0
  assert 'example:' in text and f'var-jax {verb} --' in text.split('example:')[1]


def test_help_names_every_verb(capsys):
  assert main(['--help']) == 0
  text = capsys.readouterr().out
  assert all(verb in text for verb in VERBS) and 'example: var-jax' in text
  assert main([]) == 2


NAMES = ('ant', 'caf\u00e9', 'crane', 'crane', 'great white, shark', '10', 'all', 'Wolf', '0-3', 'bee', 'x')


@pytest.mark.parametrize('text, wanted', [
    ('0,3,7', [0, 3, 7]), ('2-5', [2, 3, 4, 5]), ('all', list(range(11))), ('10', [10]), ('name:10', [5]),
    ('name:all', [6]), ('name:0-3', [8]), ('bee,0-1, 7 ,ant', [9, 0, 1, 7, 0]), ('cafe\u0301', [1]),
    ('great white, shark', [4]), ('ant,great white, shark,bee', [0, 4, 9]), ('name:great white, shark,1', [4, 1])])
def test_classes_are_found_by_number_range_and_name(text, wanted):
  assert labels.find(text, 11, NAMES) == wanted


@pytest.mark.parametrize('text, words', [
    ('ants', 'no class .ants. .near: ant'), ('wolf', 'near: Wolf'), ('11', 'label 11 .* 0 to 10'), ('-1', 'label -1'),
    ('0-11', 'label 11'), ('0-2000000000', 'label 2000000000 '), ('9' * 5000, 'label 99999'), ('5-2', 'write 2-5'),
    ('crane', 'called .crane.*2, 3'), ('1,,2', "no class ''"), ('name:', 'no class'),
    ('qqqqqq', 'give whole numbers from 0 to 10')])
def test_classes_that_do_not_exist_are_refused_with_what_is_near(text, words):
  with pytest.raises(UserError, match=words) as caught:
    labels.find(text, 11, NAMES)
  assert '\n' not in str(caught.value)
  with pytest.raises(UserError, match='not kept here'):
    labels.find('ant', 11, None)


def test_names_of_classes_go_from_the_data_into_every_workdir(experiment, tokenizer, generator, tmp_path, capsys):
  """Of both stages, of the tokenizer's copy and of the best model; from there `sample` and `edit` take them."""
  digits = tuple(map(str, range(10)))
  for place in (tokenizer, generator, generator / 'tokenizer'):
    assert workdir_lib.class_names(place) == digits, place
  work = tmp_path / 'w'
  shutil.copytree(generator, work)
  (work / 'classes.json').unlink()  # as an earlier commit left it
  resume = ['train', f'--config={experiment}:generator', f'--workdir={work}', '--config.steps=5']
  assert main([*resume, '--config.eval_every=1', '--config.best=validation/loss']) == 0
  assert workdir_lib.class_names(work) == workdir_lib.class_names(work / 'best') == digits
  assert '10 classes: 0 (' in capsys.readouterr().err
  names = ('cat', 'dog', *digits[2:])
  workdir_lib.write_class_names(work, names)
  assert var_jax.load(work).class_names == names
  drawn = sample(work, tmp_path / 'x.npz', '--labels=dog,cat,4-5')
  assert drawn['labels'].tolist() == [1, 0, 4, 5]
  assert main(['sample', f'--workdir={work}', '--labels=dig', f'--out={tmp_path}/x.npz']) == 2
  assert 'near: dog' in capsys.readouterr().err
  Image.fromarray(drawn['arr_0'][0]).save(tmp_path / 'a.png')
  assert main(['edit', f'--workdir={work}', f'--image={tmp_path}/a.png', '--box=0,0,4,4', '--label=dog',
               f'--out={tmp_path}/y.npz']) == 0
  assert arrays(tmp_path / 'y.npz')['labels'].tolist() == [1]
  before = json.loads((work / 'classes.json').read_text())
  assert main(resume) == 2
  assert "label 0 is 'cat' there, '0' here" in capsys.readouterr().err
  assert json.loads((work / 'classes.json').read_text()) == before


def test_experiments_are_there():
  assert 'digits' in {file.stem for file in EXPERIMENTS}


@pytest.mark.parametrize('stage', ['tokenizer', 'generator'])
@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_describes_both_stages_and_a_small_run(file, stage):
  for argument in (stage, f'{stage},runlocal'):
    config = flags.read_config(f'{file}:{argument}', [])
    assert config.is_locked and config.stage == stage
    assert config.steps > 0 or config.epochs > 0
    if stage == 'tokenizer':
      assert workdir_lib.make_tokenizer(config).image_size == tuple(config.image_size)
  assert 0 < config.steps <= 100 and config.batch_size <= 128
  changed = flags.read_config(f'{file}:{stage}', ['--config.batch_size=24', '--config.optimizer.peak_lr=1'])
  assert changed.batch_size == 24 and changed.optimizer.peak_lr == 1.0


@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_refuses_options_it_does_not_have(file):
  for argument, word in (('tokenizer,fast', 'fast'), ('generator,deep=3', 'deep'), ('decoder', 'decoder')):
    with pytest.raises(UserError, match=word) as error:
      flags.read_config(f'{file}:{argument}', [])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_begins_with_its_commands(file):
  text = file.read_text()
  for stage in ('tokenizer', 'generator'):
    assert f'python -m var_jax train --config=experiments/{file.name}:{stage}' in text.split('"""')[1]


def test_folder_takes_any_size_that_the_strides_allow():
  folder = ROOT / 'experiments' / 'folder.py'
  scales = {64: (1, 2, 3, 4), 128: (1, 2, 3, 4, 6, 8), 256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}  # as ever
  for size in (16, 28, 32, 48, 64, 80, 128, 256, 512):
    for cpu in ('', ',cpu'):
      config = flags.read_config(f'{folder}:tokenizer,size={size}{cpu}', [])
      tokenizer = workdir_lib.make_tokenizer(config)
      assert tokenizer.image_size == (size, size) and tokenizer.pyramid.last[0] >= 4
      if not cpu and size in scales:
        assert tuple(config.model.scales) == scales[size] and tokenizer.stride == 16
  for size, words in ((100, 'use 96 or 112'), (18, 'use 16 or 20'), (0, 'use 16')):
    with pytest.raises(UserError, match=words):
      flags.read_config(f'{folder}:tokenizer,size={size}', [])


def test_commands_begin_anew_with_huge_pages_once(monkeypatch):
  """With the same arguments; who has set glibc's tunables is left alone."""
  begun = []
  monkeypatch.setattr(os, 'execv', lambda *call: begun.append(call))
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'var_jax', 'sample', '--num=1'])
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setenv('GLIBC_TUNABLES', 'restored afterwards')
  monkeypatch.delenv('GLIBC_TUNABLES')
  for _ in range(2):
    script.with_huge_pages()
  assert begun == [(sys.executable, [sys.executable, '-m', 'var_jax', 'sample', '--num=1'])]
  assert os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'


# --- how commands end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('platform', ['cuda', 'foo'])
def test_missing_device_is_told_in_one_line(platform, tmp_path):
  """jax starts its devices with the first computation, wherever that is."""
  command = [sys.executable, '-m', 'var_jax', 'train', '--config=experiments/digits.py', f'--workdir={tmp_path}/w']
  done = subprocess.run(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': platform}, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith(f'error: jax finds no device for JAX_PLATFORMS={platform}')
  assert done.stderr.count('\n') == 1 and not (tmp_path / 'w').exists()


def test_terminal_without_the_characters_gets_help_and_file_names(monkeypatch):
  """PYTHONIOENCODING=ascii, as in many containers."""
  narrow = io.TextIOWrapper(io.BytesIO(), 'ascii')
  monkeypatch.setattr(sys, 'stdout', narrow)
  for verb in VERBS:
    with pytest.raises(SystemExit):
      main([verb, '--help'])
  assert script.status(lambda arguments: print('Bild-\xfc-\udcff.png'), []) == 0
  assert rb'Bild-\xfc-\udcff.png' in narrow.buffer.getvalue()


@pytest.mark.parametrize('buffered', ['', '1'], ids=['buffered', 'unbuffered'])
@pytest.mark.parametrize('do, status, said', [
    ('print("x" * 10)', 0, ''), ('sys.exit(print("x" * 10) or 0)', 0, ''),
    ('raise UserError("no\\nway")', 2, 'error: no way\n'), ('raise BrokenPipeError(32, "of a worker")', 1, 'worker')])
def test_output_that_nobody_reads_is_no_failure(do, status, said, buffered):
  """As with `| head`. A pipe of another kind that breaks is one."""
  code = ('import sys\nfrom var_jax.commands import script\nfrom var_jax.errors import UserError\n'
          f'def main(arguments): {do}\nscript.run(main)')
  reader, writer = os.pipe()
  os.close(reader)
  stdout = subprocess.DEVNULL if 'worker' in do else writer
  done = subprocess.run([sys.executable, '-c', code], stdout=stdout, stderr=subprocess.PIPE, text=True,
                        env=os.environ | {'PYTHONUNBUFFERED': buffered})
  os.close(writer)
  assert done.returncode == status and said in done.stderr and bool(said) == bool(done.stderr)


def test_flag_given_twice_is_told(capsys, tmp_path):
  assert main(['sample', '--seed=1', '--seed=2', f'--workdir={tmp_path}', f'--out={tmp_path / "x.npz"}']) == 2
  assert '--seed is given 2 times: the last one counts' in capsys.readouterr().err


def test_notes_to_a_terminal_that_is_gone_end_nothing(monkeypatch):
  class Gone(io.StringIO):
    def write(self, text):
      raise OSError(5, 'Input/output error')

  monkeypatch.setattr(sys, 'stderr', Gone())
  note('saved')


# --- results that would mix, or be lost ------------------------------------------------------------------------------


@pytest.mark.slow
def test_folder_goes_on_and_takes_no_pictures_of_another_call(generator, tmp_path, monkeypatch, capsys):
  options = ['sample', f'--workdir={generator}', '--labels=0,3,7', '--seed=1', '--batch_size=4']
  assert main([*options, '--num=10', f'--out={tmp_path}/straight']) == 0
  draw, calls = var_jax.model.Model.sample, []

  def twice(*arguments, first, **choices):
    calls.append(first)
    if calls == [0, 4]:
      raise OSError(28, 'No space left on device')
    return draw(*arguments, first=first, **choices)

  monkeypatch.setattr(var_jax.model.Model, 'sample', twice)
  assert main([*options, '--num=10', f'--out={tmp_path}/x']) == 2
  assert main([*options, '--num=10', '--seed=2', f'--out={tmp_path}/x']) == 2 and 'mix' in capsys.readouterr().err
  assert main([*options, '--num=10', f'--out={tmp_path}/x']) == 0 and calls == [0, 4, 4, 8]
  kept = {file.name: file.read_bytes() for file in (tmp_path / 'x').iterdir()}
  assert kept == {file.name: file.read_bytes() for file in (tmp_path / 'straight').iterdir()} and len(kept) == 10
  assert main([*options, '--num=5', f'--out={tmp_path}/x']) == 2 and 'another --out' in capsys.readouterr().err
  assert main([*options, '--num=10', '--seed=2', f'--out={tmp_path}/x']) == 0  # replaces all that was there
  assert not kept.items() & {file.name: file.read_bytes() for file in (tmp_path / 'x').iterdir()}.items()


def test_too_many_images_for_a_picture_are_refused_before_they_are_drawn(generator, tmp_path, monkeypatch, capsys):
  """Of 8 px, each takes 68: a webp has sides of 16,383 pixels."""
  monkeypatch.setattr(var_jax.model.Model, 'sample', lambda *_, **__: pytest.fail('drawn'))
  for name, classes, num, most in (('x.webp', '0', 300, 240), ('x.jpg', '0', 1000, 963), ('x.png', 'all', 10**6, None)):
    assert main(['sample', f'--workdir={generator}', f'--labels={classes}', f'--num={num}',
                 f'--out={tmp_path / name}']) == 2
    error = capsys.readouterr().err
    assert f'{num} images do not fit' in error and (most is None or f', {most} do' in error)


def test_largest_sheet_that_fits_can_be_written(tmp_path):
  for suffix, count in (('.webp', 240), ('.jpg', 963)):
    output.check_sheet(f'x{suffix}', count, (8, 8), 1)
    output.save(tmp_path / f'x{suffix}', None, pictures_lib.sheet(np.zeros((count, 8, 8, 3), np.uint8), 1))


@pytest.mark.slow
def test_names_with_dots_are_folders_and_suffixes_have_any_case(generator, tmp_path):
  options = ['sample', f'--workdir={generator}', '--labels=1', '--num=2']
  for name in ('cfg1.5', 'run.v2', 'top_p.96'):
    assert main([*options, f'--out={tmp_path / name}']) == 0 and (tmp_path / name / '000001.png').is_file()
  assert main([*options, f'--out={tmp_path}/x.NPZ']) == 0 and arrays(tmp_path / 'x.NPZ')['arr_0'].shape == (2, 8, 8, 3)
  command = ['reconstruct', f'--workdir={generator}']
  assert main([*command, f'--tokens={tmp_path}/x.NPZ', f'--out={tmp_path}/y.NPZ']) == 0
  assert (tmp_path / 'y.NPZ').is_file() and main([*command, '--held_out=2', f'--out={tmp_path}/z.PNG']) == 0


def test_all_images_that_are_named_are_taken(tokenizer, pictures, tmp_path):
  first, second = pictures
  shutil.copy(first, tmp_path / 'a,b.png')
  assert main(['reconstruct', f'--workdir={tokenizer}', f'--images={first}', f'--images={second},{tmp_path}/a,b.png',
               f'--images={tmp_path}/a,b.png', f'--out={tmp_path}/x.npz']) == 0
  assert len(arrays(tmp_path / 'x.npz')['arr_0']) == 4


def test_files_are_named_apart_in_little_time():
  names = reconstruct._names(['x/a.png', 'y/a.png', 'z/a_000001.png', *(f'{i % 25_000}.png' for i in range(50_000))])
  assert len(set(names)) == len(names) and names[2] == 'a_000001'


def test_picture_has_a_row_for_each_label():
  images = np.repeat(np.arange(5, dtype=np.uint8), 64 * 64 * 3).reshape(5, 64, 64, 3)
  shown = pictures_lib.sheet(images, rows=2)[34::68, 34::68, 0]
  assert shown.tolist() == [[0, 2, 4], [1, 3, 255]]
  assert pictures_lib.sheet(images).shape[:2] == pictures_lib.sheet_size(5, (64, 64))
