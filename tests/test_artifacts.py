"""What `export` writes runs without var_jax, gives the same pictures, and says where it cannot run."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export
from orbax.checkpoint import v1 as ocp
from tiny_runs import ROOT, differing, train_both, truncate

import var_jax
from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.errors import UserError
from var_jax.weights import read_tensors

WITHOUT_VAR_JAX = ('import runpy, sys; sys.modules["var_jax"] = None; sys.argv = sys.argv[1:]; '
                   'runpy.run_path(sys.argv[0], run_name="__main__")')


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  _, tokenizer, generator = train_both(tmp_path_factory)
  return tokenizer, generator


@pytest.fixture(scope='module')
def folder(workdirs, tmp_path_factory):
  """Artifacts for a CPU, with their weights inside."""
  folder = tmp_path_factory.mktemp('artifacts') / 'out'
  assert main(['export', f'--workdir={workdirs[1]}', f'--out={folder}', '--platforms=cpu', '--top_k=20']) == 0
  return folder


def on_one_device(*command):
  """Runs Python as a user does: one device, all optimizations."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith('XLA')}
  return subprocess.run([sys.executable, *map(str, command)], env=environment | {'JAX_PLATFORMS': 'cpu'},
                        capture_output=True, text=True, cwd=ROOT)


def run_artifact(folder, out, *options):
  return on_one_device('-c', WITHOUT_VAR_JAX, 'launch/run_artifact.py', folder, '--labels=0,3,7', '--seed=5',
                       '--cfg=2', f'--out={out}', *options)


def test_exported_sampler_without_var_jax_gives_the_same_pictures(workdirs, folder, tmp_path):
  ran = run_artifact(folder, tmp_path / 'artifact.npz')
  assert ran.returncode == 0, ran.stderr
  ran = on_one_device('-m', 'var_jax', 'sample', f'--workdir={workdirs[1]}', '--labels=0,3,7', '--seed=5', '--cfg=2',
                      '--top_k=20', f'--out={tmp_path / "sample.npz"}')
  assert ran.returncode == 0, ran.stderr
  with np.load(tmp_path / 'artifact.npz') as artifact, np.load(tmp_path / 'sample.npz') as sample:
    assert artifact['arr_0'].dtype == np.uint8 and artifact['arr_0'].std() > 0
    np.testing.assert_array_equal(artifact['arr_0'], sample['arr_0'])
    np.testing.assert_array_equal(artifact['labels'], sample['labels'])


def loaded(file):
  return export.deserialize(bytearray(file.read_bytes()))


@pytest.mark.parametrize('count', [1, 6])
def test_encoder_and_decoder_take_any_batch(workdirs, folder, count):
  model = var_jax.load(workdirs[1])
  images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
  tokens = np.asarray(loaded(folder / 'encode.jaxexport').call(images))
  np.testing.assert_array_equal(tokens, model.encode(images))
  drawn = np.asarray(loaded(folder / 'decode.jaxexport').call(tokens))
  assert drawn.dtype == np.uint8 and np.abs(drawn.astype(int) - model.decode(tokens)).max() <= 1


def test_weights_beside_are_the_first_argument(workdirs, folder, tmp_path):
  out = tmp_path / 'out'
  assert main(['export', f'--workdir={workdirs[0]}', f'--out={out}', '--weights=beside']) == 0
  assert not (out / 'sample.jaxexport').exists()  # a tokenizer draws nothing
  assert (out / 'encode.jaxexport').stat().st_size < (folder / 'encode.jaxexport').stat().st_size
  encode = loaded(out / 'encode.jaxexport')
  assert encode.platforms == ('cpu', 'cuda', 'tpu')
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
  tokens = jax.jit(encode.call)(read_tensors(out / 'weights.npz'), images)
  np.testing.assert_array_equal(tokens, var_jax.load(workdirs[0]).encode(images))
  about = json.loads((out / 'about.json').read_text())
  assert about['image_size'] == [8, 8] and about['artifacts'].keys() == {'encode', 'decode'}


def test_parameters_alone_are_an_orbax_checkpoint(workdirs, folder):
  generator, params, _, tokenizer_params = workdir_lib.load_generator(workdirs[1])
  assert not differing(ocp.load(folder / 'params'), {'generator': params, 'tokenizer': tokenizer_params})


def test_raw_parameters_are_not_their_average(workdirs, tmp_path):
  average, raw = (workdir_lib.load_generator(workdirs[1], raw=raw) for raw in (False, True))
  assert 'head' in raw[1] and differing(average[1], raw[1])
  assert not differing(average[3], raw[3])  # the tokenizer's copy holds what the generator was trained with
  assert differing(workdir_lib.load_tokenizer(workdirs[0])[1], workdir_lib.load_tokenizer(workdirs[0], raw=True)[1])
  assert not differing(average[3], workdir_lib.load_tokenizer(workdirs[1], raw=True)[1])
  with pytest.raises(UserError, match='--raw'):
    workdir_lib.load_tokenizer(workdirs[1] / 'tokenizer', raw=True)


def test_artifact_of_another_platform_says_so(workdirs, tmp_path):
  out = tmp_path / 'out'
  assert main(['export', f'--workdir={workdirs[1]}', f'--out={out}', '--platforms=tpu,cuda', '--weights=beside']) == 0
  ran = run_artifact(out, tmp_path / 'x.npz')
  assert ran.returncode == 2 and ran.stderr.count('\n') == 1
  assert 'tpu, cuda' in ran.stderr and '--platforms=cpu' in ran.stderr
  ran = run_artifact(tmp_path, tmp_path / 'x.npz')
  assert ran.returncode == 2 and 'export' in ran.stderr and ran.stderr.count('\n') == 1


@pytest.mark.parametrize('options, word', [
    (['--labels=0,10'], '0 to 9'), (['--out=missing/x.npz'], '--out'), (['--cfg=much'], '--cfg'),
    (['CUT'], 'no whole export'), (['SWAPPED'], 'do not belong together')])
def test_example_refuses_what_cannot_be_drawn(folder, tmp_path, options, word):
  if options == ['CUT']:
    shutil.copytree(folder, tmp_path / 'cut')
    truncate(tmp_path / 'cut')
    folder, options = tmp_path / 'cut', []
  if options == ['SWAPPED']:
    shutil.copytree(folder, tmp_path / 'swapped')
    shutil.copy(folder / 'decode.jaxexport', tmp_path / 'swapped/sample.jaxexport')
    folder, options = tmp_path / 'swapped', []
  ran = run_artifact(folder, tmp_path / 'x.npz', *options)
  assert ran.returncode == 2 and ran.stderr.startswith('error: ') and ran.stderr.count('\n') == 1
  assert word in ran.stderr and not (tmp_path / 'x.npz').exists()


def test_artifacts_hold_what_they_need_and_no_more(folder):
  sizes = {name: (folder / f'{name}.jaxexport').stat().st_size for name in ('encode', 'decode', 'sample')}
  params = sum(x.nbytes for x in jax.tree.leaves(ocp.load(folder / 'params')['tokenizer']['encoder']))
  assert sizes['encode'] < params + 200_000 < sizes['sample'] + 200_000, sizes


def test_platforms_count_once_and_class_names_come_along(workdirs, tmp_path):
  workdir = shutil.copytree(workdirs[0], tmp_path / 'w')
  workdir_lib.write_class_names(workdir, ['cat', 'Hündin'])
  assert main(['export', f'--workdir={workdir}', f'--out={tmp_path / "out"}', '--platforms=cpu, cpu']) == 0
  about = json.loads((tmp_path / 'out/about.json').read_text())
  assert about['platforms'] == ['cpu'] and about['class_names'] == ['cat', 'Hündin']


def test_export_refuses_what_does_not_fit(workdirs, folder, tmp_path, capsys):
  workdir, new = f'--workdir={workdirs[1]}', f'--out={tmp_path / "new"}'
  for arguments, word in (([workdir, f'--out={folder}'], 'already'), ([workdir, new, '--platforms=gpu'], 'gpu'),
                          ([workdir, new, '--top_k=-1'], 'top_k'), ([f'--workdir={tmp_path}', new], 'no workdir'),
                          ([workdir, new, '--weights=nowhere'], 'nowhere')):
    assert main(['export', *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and '\n' not in error
  assert not (tmp_path / 'new').exists()
