"""Evaluation through the command: known sets give known figures, on any device count; samples that go on; bad input."""

import json
import os
import shutil
import subprocess
import sys

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import export
from PIL import Image
from tiny_runs import ROOT, train_both

import var_jax
from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.data.images import fit
from var_jax.data.sources import open_source
from var_jax.errors import UserError
from var_jax.evaluation import fid, image_sets, measures, reconstruction, report
from var_jax.evaluation.drawing import draw
from var_jax.training import mesh as mesh_lib


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  _, tokenizer, generator = train_both(tmp_path_factory)
  return tokenizer, generator


# --- measures --------------------------------------------------------------------------------------------------------


def test_inception_score_of_known_distributions():
  """Sure and even over C classes: C. The same answer always: 1. Splits are averaged."""
  sure = 50 * np.eye(10)[np.arange(40) % 10]
  np.testing.assert_allclose(measures.inception_score(sure), 10, rtol=1e-6)
  np.testing.assert_allclose(measures.inception_score(np.ones((40, 10)) * 3), 1, rtol=1e-9)
  np.testing.assert_allclose(measures.inception_score(sure, split=1), 1, rtol=1e-6)  # a split holds one image


def test_inception_score_does_not_depend_on_the_order_of_images():
  """Samples are drawn class by class: splits in order hold a tenth of the classes each, and score as much less."""
  rng = np.random.default_rng(0)
  by_class = 8 * np.eye(50, dtype=np.float32)[np.repeat(np.arange(50), 20)] + rng.normal(size=(1000, 50)).astype('f')
  scores = [measures.inception_score(rows, split=100) for rows in
            (by_class, by_class[rng.permutation(1000)], by_class[::-1])]
  assert scores == pytest.approx([scores[0]] * 3, rel=1e-12) and scores[0] > 25


def test_precision_and_recall_against_their_definition():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(60, 5)), rng.normal(size=(40, 5)) * 0.5 + 0.3

  def within(centres, points):
    d = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    radius = np.sort(d, axis=1)[:, 3]
    return np.mean((np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radius).any(1))

  for block in (7, 2048):
    assert measures.precision_recall(a, b, block=block) == pytest.approx((within(a, b), within(b, a)))
  assert measures.precision_recall(a, a + 100) == (0, 0) and measures.precision_recall(a, a) == (1, 1)
  with pytest.raises(UserError, match='3 sample images'):
    measures.precision_recall(a, b[:3])


def test_ssim_of_known_images():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (2, 24, 20, 3), np.uint8)
  np.testing.assert_allclose(reconstruction.ssim(x, x), 1)
  flat, other = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
  c1 = (0.01 * 255)**2
  expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)  # no structure: the luminance term alone
  np.testing.assert_allclose(reconstruction.ssim(flat, other), expected, rtol=1e-9)
  assert (reconstruction.ssim(x, 255 - x) < 0.1).all() and reconstruction.ssim(x[:, :6, :8], x[:, :6, :8]).shape == (2,)


# --- image sets ------------------------------------------------------------------------------------------------------


def some_images(count, size=16, seed=0):
  """Smooth coloured pictures that differ from each other."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
  return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR)) for x in small])


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_and_folder_give_the_same_images(tmp_path, save):
  images = some_images(7)
  save(tmp_path / 'x.npz', labels=np.arange(7), arr_0=images)
  (tmp_path / 'folder/sub').mkdir(parents=True)
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / 'folder' / ('sub' if i > 4 else '') / f's{i}.png')
  for name in ('x.npz', 'folder'):
    opened = image_sets.open_images(tmp_path / name)
    assert (opened.count, tuple(opened.size)) == (7, (16, 16))
    batches = list(opened.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_what_holds_no_images_is_told(tmp_path):
  np.savez(tmp_path / 'float.npz', arr_0=np.full((3, 8, 8, 3), np.nan, np.float32))
  np.savez(tmp_path / 'grey.npz', arr_0=np.zeros((3, 8, 8), np.uint8))
  np.savez(tmp_path / 'other.npz', images=np.zeros((3, 8, 8, 3), np.uint8))
  (tmp_path / 'html.npz').write_text('<html>')
  np.savez(tmp_path / 'cut.npz', arr_0=some_images(40))
  content = (tmp_path / 'cut.npz').read_bytes()
  (tmp_path / 'cut.npz').write_bytes(content[:len(content) // 2])
  (tmp_path / 'sizes').mkdir()
  (tmp_path / 'empty').mkdir()
  for i, size in enumerate((8, 9)):
    Image.fromarray(some_images(1, size)[0]).save(tmp_path / f'sizes/{i}.png')
  for name, word in (('float.npz', 'float32'), ('grey.npz', 'N, H, W, 3'), ('other.npz', 'arr_0'),
                     ('html.npz', 'no .npz'), ('cut.npz', 'truncated'), ('sizes', '9x9'), ('empty', 'no images'),
                     ('none.npz', 'none.npz')):
    with pytest.raises(UserError, match=word):
      list(image_sets.open_images(tmp_path / name).batches(2))


# --- the command, with the Inception ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  file = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
  safetensors.numpy.save_file(golden_files.weights('', 'inception_manifest.json')[1], file)
  return file


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sets')
  np.savez(folder / 'samples.npz', arr_0=some_images(9, seed=1))
  np.savez(folder / 'reference.npz', arr_0=some_images(11, seed=2))
  return folder


def evaluate(out, *options):
  assert main(['evaluate', *options, f'--out={out}']) == 0
  return json.loads(out.read_text())


def test_figures_are_those_of_the_features(weights, sets, tmp_path, capsys):
  """By the definitions, from the features in another order and with other filling."""
  samples, reference = f'--samples={sets / "samples.npz"}', f'--reference={sets / "reference.npz"}'
  common = ['--features=inception', f'--weights={weights}', '--resize=half_pixel']
  figures = evaluate(tmp_path / 'x.json', samples, reference, *common)
  assert json.loads(capsys.readouterr().out) == figures
  run, found = fid.inception_extractor(weights, 'half_pixel').run, []
  for count, seed in ((9, 1), (11, 2)):
    features = run(np.resize(some_images(count, seed=seed), (16, 16, 16, 3))[::-1])
    found.append({name: x[::-1][:count] for name, x in features.items()})
  a, b = found

  assert figures['fid'] == pytest.approx(distance(a['pool'], b['pool']), rel=1e-6)
  assert figures['sfid'] == pytest.approx(distance(a['spatial'], b['spatial']), rel=1e-6)
  assert figures['inception_score'] == pytest.approx(measures.inception_score(a['logits']), rel=1e-5)
  assert figures['samples'] == 9 and figures['resize'] == 'half_pixel'
  precision, recall = measures.precision_recall(b['pool'], a['pool'])
  assert (figures['precision'], figures['recall']) == (precision, recall)


def distance(x, y):
  """The Fréchet distance from the rows themselves: tr((S1 S2)^(1/2)) is the sum of the singular values of X Y^T."""
  mean_x, mean_y = (np.float64(z).mean(0) for z in (x, y))
  x, y = ((np.float64(z) - z.mean(0, dtype=np.float64)) / np.sqrt(len(z) - 1) for z in (x, y))
  root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  return ((mean_x - mean_y)**2).sum() + (x**2).sum() + (y**2).sum() - 2 * root


@pytest.mark.slow
def test_statistics_in_place_of_images(weights, sets, tmp_path):
  """As the published reference files have them, with or without images beside."""
  extractor = fid.inception_extractor(weights, 'tf1')
  gathered = fid.gather(image_sets.open_images(sets / 'reference.npz'), extractor)
  np.savez(tmp_path / 'both.npz', mu=gathered.pool[0], sigma=gathered.pool[1], mu_s=gathered.spatial[0],
           sigma_s=gathered.spatial[1], arr_0=some_images(11, seed=2))
  np.savez(tmp_path / 'stats.npz', mu=gathered.pool[0], sigma=gathered.pool[1])
  common = [f'--samples={sets / "samples.npz"}', f'--weights={weights}']
  images = evaluate(tmp_path / 'x.json', *common, f'--reference={sets / "reference.npz"}')
  both = evaluate(tmp_path / 'x.json', *common, f'--reference={tmp_path / "both.npz"}')
  assert both.pop('resize') == images.pop('resize') and both == pytest.approx(images, rel=1e-6)
  alone = evaluate(tmp_path / 'x.json', *common, f'--reference={tmp_path / "stats.npz"}')
  assert alone.keys() == {'samples', 'resize', 'fid', 'inception_score'}
  assert alone['fid'] == pytest.approx(images['fid'])


@pytest.mark.slow
def test_figures_do_not_depend_on_the_devices(weights, sets, monkeypatch):
  """1, 2 and 8 devices; 9 and 11 images fill no batch."""
  found = []
  make = mesh_lib.make_mesh
  for count in (1, 2, 8):
    monkeypatch.setattr(mesh_lib, 'make_mesh', lambda devices=None: make(jax.devices()[:count]))
    extractor = fid.inception_extractor(weights, 'tf1')
    assert extractor.devices == count
    found.append(fid.compare(*(fid.gather(image_sets.open_images(sets / f'{name}.npz'), extractor)
                               for name in ('samples', 'reference'))))
  assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)


# --- the command, with a workdir -------------------------------------------------------------------------------------


def test_generator_is_judged_and_the_judge_is_kept(workdirs, tmp_path, capfd):
  generator = tmp_path / 'g'
  shutil.copytree(workdirs[1], generator)
  command = [f'--workdir={generator}', '--per_class=2']
  figures = evaluate(tmp_path / 'x.json', *command)
  assert figures['samples'] == 20 and figures['judge_accuracy_on_real_images'] > 0.8
  assert {'samples_judged_as_their_class', 'classifier_frechet_distance', 'classifier_precision', 'classifier_recall',
          'validation_loss', 'validation_accuracy_scale_2'} < figures.keys()
  assert not {'fid', 'precision'} & figures.keys()
  capfd.readouterr()
  assert evaluate(tmp_path / 'x.json', *command) == figures
  assert 'judge:' not in capfd.readouterr().err  # its training has a progress bar
  (generator / 'judge.jaxexport').unlink()
  given = evaluate(tmp_path / 'x.json', f'--workdir={generator}', f'--samples={generator / "evaluation_samples.npz"}')
  assert given.items() < figures.items() and (generator / 'judge.jaxexport').exists()


def test_workdir_that_cannot_be_written_to(workdirs, tmp_path, monkeypatch, capsys):
  """What is kept goes beside the JSON; the workdir stays as it was."""
  before = sorted(workdirs[1].rglob('*'))
  can = os.access
  monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(workdirs[1]) and can(path, mode))
  evaluate(tmp_path / 'out/x.json', f'--workdir={workdirs[1]}', '--per_class=1')
  assert {file.name for file in (tmp_path / 'out').iterdir()} == {
      'x.json', 'report.html', 'judge.npz', 'judge.jaxexport', 'evaluation_samples.npz'}
  assert sorted(workdirs[1].rglob('*')) == before and 'cannot be written to' in capsys.readouterr().err


@pytest.mark.slow
def test_own_data_are_the_reference_and_kept(workdirs, weights, tmp_path, monkeypatch):
  generator = tmp_path / 'g'
  shutil.copytree(workdirs[1], generator)
  (tmp_path / 'few').mkdir()
  config = json.loads((generator / 'config.json').read_text())
  x, y = some_images(12, 8), np.arange(12) % 10
  np.savez(tmp_path / 'few.npz', x_train=x, y_train=y, x_test=x, y_test=y)
  config['data'] |= {'source': 'arrays', 'path': str(tmp_path / 'few.npz')}
  (generator / 'config.json').write_text(json.dumps(config))
  command = [f'--workdir={generator}', '--per_class=1', f'--weights={weights}']
  figures = evaluate(tmp_path / 'x.json', *command)
  assert {'fid', 'sfid', 'inception_score', 'precision', 'recall', 'validation_loss'} < figures.keys()
  assert len(list(generator.glob('reference_*.npz'))) == 1
  monkeypatch.setattr(fid, 'gather_source', None)  # the second time it is not read again
  given = f'--samples={generator / "evaluation_samples.npz"}'
  again = evaluate(tmp_path / 'x.json', command[0], command[2], given)
  assert again.pop('resize') == figures['resize']
  assert again == pytest.approx({name: figures[name] for name in again}, rel=1e-6)


@pytest.mark.slow
def test_reference_is_enough_where_the_data_set_is_missing(workdirs, weights, tmp_path, capsys):
  generator = tmp_path / 'g'
  shutil.copytree(workdirs[1], generator)
  config = json.loads((generator / 'config.json').read_text())
  config['data'] |= {'source': 'arrays', 'path': str(tmp_path / 'gone.npz')}
  (generator / 'config.json').write_text(json.dumps(config))
  np.savez(tmp_path / 'r.npz', arr_0=some_images(12, 8))
  x, y = some_images(12, 8), np.arange(12) % 10
  np.savez(tmp_path / 'moved.npz', x_train=x, y_train=y, x_test=x, y_test=y)
  figures = evaluate(tmp_path / 'x.json', f'--workdir={generator}', '--per_class=1', f'--weights={weights}',
                     f'--reference={tmp_path / "r.npz"}')
  assert 'fid' in figures and 'validation_loss' not in figures
  assert 'gone.npz' in capsys.readouterr().err
  figures = evaluate(tmp_path / 'x.json', f'--workdir={generator}', '--per_class=1', f'--data={tmp_path / "moved.npz"}')
  assert figures['validation_images'] == 12


def test_tokenizer_is_measured(workdirs, weights, tmp_path, capsys):
  figures = evaluate(tmp_path / 'x.json', f'--workdir={workdirs[0]}')
  assert figures['images'] == 297 and 0 < figures['psnr'] < 40 and -1 < figures['ssim'] < 1
  assert {'usage_4x4', 'perplexity_1x1'} < figures.keys() and 'rfid' not in figures
  evaluate(tmp_path / 'x.json', f'--workdir={workdirs[0]}', '--cfg=2')
  assert '--cfg has no use here' in capsys.readouterr().err


# --- many samples ----------------------------------------------------------------------------------------------------


CHOICES = dict(cfg=1.5, top_k=0, top_p=0.9, temperature=1.0, smooth=False)


class Stopped(Exception):
  pass


def test_interrupted_drawing_goes_on_without_repeating_or_losing_one(workdirs, tmp_path, monkeypatch, capsys):
  model, labels = var_jax.load(workdirs[1]), np.arange(21) % 10
  draw(model, labels, 3, tmp_path / 'straight.npz', CHOICES, 8)
  calls, sample = [], model.sample

  def count(labels, seed, *, first, **options):
    calls.append(first)
    if len(calls) == 2:
      raise Stopped
    return sample(labels, seed, first=first, **options)

  monkeypatch.setattr(model, 'sample', count)
  with pytest.raises(Stopped):
    draw(model, labels, 3, tmp_path / 'x.npz', CHOICES, 8)
  assert not (tmp_path / 'x.npz').exists()
  draw(model, labels, 3, tmp_path / 'x.npz', CHOICES, 8)
  assert calls == [0, 8, 8, 16] and '8 of 21' in capsys.readouterr().err
  with np.load(tmp_path / 'x.npz') as resumed, np.load(tmp_path / 'straight.npz') as straight:
    assert set(resumed.files) == {'arr_0', 'labels', 'tokens'}
    for name in resumed.files:
      np.testing.assert_array_equal(resumed[name], straight[name])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['straight.npz', 'x.npz']  # nothing is left behind


def test_another_call_begins_anew(workdirs, tmp_path, monkeypatch):
  model, labels = var_jax.load(workdirs[1]), np.arange(21) % 10
  sample = model.sample
  monkeypatch.setattr(model, 'sample', lambda *args, first, **options: (
      sample(*args, first=first, **options) if first == 0 else pytest.fail('stop')))
  with pytest.raises(BaseException, match='stop'):
    draw(model, labels, 3, tmp_path / 'x.npz', CHOICES, 8)
  monkeypatch.setattr(model, 'sample', sample)
  draw(model, labels, 4, tmp_path / 'x.npz', CHOICES, 8)
  draw(model, labels, 4, tmp_path / 'straight.npz', CHOICES, 8)
  with np.load(tmp_path / 'x.npz') as x, np.load(tmp_path / 'straight.npz') as straight:
    np.testing.assert_array_equal(x['tokens'], straight['tokens'])


def test_ten_thousand_pairs_in_constant_memory(tmp_path):
  """The reader and the statistics, in a process of its own whose peak is measured, with features that cost nothing."""
  program = '''
import resource, sys, numpy as np
from var_jax.evaluation import fid, image_sets
extractor = fid.Extractor(lambda x: {"pool": x[:, ::32, ::32].reshape(len(x), -1).astype(np.float32)})
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fid.gather(image_sets.open_images(sys.argv[1]), extractor)
before = peak()
found = [fid.gather(image_sets.open_images(file), extractor) for file in sys.argv[2:]]
print(peak() - before, found[0].count)
'''
  rng = np.random.default_rng(0)
  np.savez(tmp_path / 'few.npz', arr_0=rng.integers(0, 256, (100, 64, 64, 3), np.uint8))
  many = rng.integers(0, 256, (10_000, 64, 64, 3), np.uint8)
  np.savez(tmp_path / 'a.npz', arr_0=many)
  np.savez(tmp_path / 'b.npz', arr_0=many[::-1])
  ran = subprocess.run([sys.executable, '-c', program, *(str(tmp_path / f) for f in ('few.npz', 'a.npz', 'b.npz'))],
                       capture_output=True, text=True, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert ran.returncode == 0, ran.stderr
  grown, count = map(int, ran.stdout.split())
  assert count == 10_000 and grown < 20_000  # kB, where a set takes 123 MB


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, word', [
    ([], '--workdir'), (['--samples=S'], '--workdir'), (['--samples=S', '--weights=W'], '--reference'),
    (['--samples=S', '--reference=R', '--features=inception'], '--weights'),
    (['--samples=S', '--reference=BIG', '--weights=W'], '32x32'),
    (['--samples=ONE', '--reference=R', '--weights=W'], 'at least 2'),
    (['--samples=NONE', '--reference=R', '--weights=W'], 'at least 2'),
    (['--samples=FLOAT', '--reference=R', '--weights=W'], 'float32'),
    (['--samples=S', '--reference=R', '--weights=VGG'], 'Inception'),
    (['--samples=S', '--reference=none.npz', '--weights=W'], 'none.npz'),
    (['--samples=S', '--reference=NAN', '--weights=W'], 'not a finite mean'),
    (['--samples=S', '--reference=SMALL', '--weights=W'], '8 features'),
    (['--samples=S', '--reference=R', '--weights=W', '--data=R'], '--data'),
    (['--samples=S', '--workdir=GENERATOR'], 'of 8x8'),
    (['--samples=MORE', '--workdir=GENERATOR'], 'labels are int64 (3,)'),
    (['--samples=ELEVEN', '--workdir=GENERATOR'], 'from 0 to 11'),
    (['--workdir=GENERATOR', '--weights=W', '--reference=R'], 'of 8x8'),
    (['--workdir=GENERATOR', '--samples=S', '--grid=cfg=1'], '--grid'),
    (['--workdir=TOKENIZER', '--grid=cfg=1'], '--grid'),
    (['--workdir=GENERATOR', '--data=folder:none'], 'none'),
    (['--samples=S', '--reference=R', '--weights=W', '--resize=area'], 'area'),
    (['--samples=S', '--reference=R', '--weights=W', '--out=x.txt'], '.json')])
def test_what_cannot_be_evaluated_is_refused(workdirs, weights, sets, tmp_path, capsys, options, word):
  files = {'BIG': sets / 'big.npz', 'ONE': sets / 'one.npz', 'NONE': sets / 'zero.npz', 'FLOAT': sets / 'float.npz',
           'VGG': sets / 'v.safetensors', 'NAN': sets / 'nan.npz', 'SMALL': sets / 'small.npz',
           'MORE': sets / 'more.npz', 'ELEVEN': sets / 'eleven.npz', 'GENERATOR': workdirs[1], 'TOKENIZER': workdirs[0],
           'S': sets / 'samples.npz', 'R': sets / 'reference.npz', 'W': weights}
  np.savez(files['BIG'], arr_0=some_images(4, 32))
  np.savez(files['ONE'], arr_0=some_images(1))
  np.savez(files['NONE'], arr_0=some_images(1)[:0])
  np.savez(files['FLOAT'], arr_0=some_images(4).astype(np.float32))
  np.savez(files['NAN'], mu=np.full(8, np.nan), sigma=np.eye(8))
  np.savez(files['SMALL'], mu=np.zeros(8), sigma=np.eye(8))
  np.savez(files['MORE'], arr_0=some_images(4, 8), labels=np.arange(3))
  np.savez(files['ELEVEN'], arr_0=some_images(4, 8), labels=np.array([0, 1, 2, 11]))
  safetensors.numpy.save_file({'features.0.weight': np.zeros(3, np.float32)}, files['VGG'])
  arguments = [f'{flag}={files.get(value, value)}' for flag, value in (o.split('=', 1) for o in options)]
  out = [] if any(argument.startswith('--out') for argument in arguments) else [f'--out={tmp_path / "x.json"}']
  assert main(['evaluate', *out, *arguments]) == 2
  error = capsys.readouterr().err.strip()
  assert word in error and '\n' not in error and not (tmp_path / 'x.json').exists()


def test_grid_compares_all_combinations(workdirs, tmp_path, capsys):
  generator = tmp_path / 'g'
  shutil.copytree(workdirs[1], generator)
  figures = evaluate(tmp_path / 'x.json', f'--workdir={generator}', '--per_class=1', '--grid=cfg=0,3;top_k=1,9')
  assert [(row['cfg'], row['top_k']) for row in figures['grid']] == [(0, 1), (0, 9), (3, 1), (3, 9)]
  distances = [row['classifier_frechet_distance'] for row in figures['grid']]
  assert len(set(distances)) > 1 and figures['best']['classifier_frechet_distance'] == min(distances)
  assert Image.open(tmp_path / 'x.png').size[0] > 300
  assert len(capsys.readouterr().err.strip().splitlines()) >= 5  # the table: a title and a line for each point
  for wrong, word in (('cfg=a', 'cfg'), ('seed=1', 'seed'), ('cfg', 'cfg'), ('cfg=1;cfg=2', 'twice')):
    assert main(['evaluate', f'--workdir={generator}', f'--grid={wrong}', f'--out={tmp_path / "y.json"}']) == 2
    assert word in capsys.readouterr().err


def test_report_is_one_file_with_every_part(workdirs, tmp_path):
  for workdir, parts in ((workdirs[0], ['Training', 'Codebook', 'scale adds', 'Settings', 'Environment']),
                         (workdirs[1], ['Samples', 'Nearest training images', 'validation loss'])):
    copy = tmp_path / workdir.name
    shutil.copytree(workdir, copy)
    with (copy / 'metrics.jsonl').open('a') as file:
      file.write('{"step": 9, "train/l')  # a line cut short by a kill
    evaluate(tmp_path / 'x.json', f'--workdir={copy}', '--per_class=1')
    page = (copy / 'report.html').read_text()
    assert all(part in page for part in parts)
    assert 'src="data:image/png;base64,' in page and 'http' not in page  # nothing is fetched


def test_nearest_training_image_of_a_copy_is_the_original(workdirs):
  """The neighbours' picture: in the row of a sample that was copied, the first neighbour equals it."""
  config = workdir_lib.read_config(workdirs[1])
  source = open_source('digits', '', 'train')
  copied = np.stack([fit(source[i][0], (8, 8), enlarge=1) for i in (1, 700)])
  tiles = report.neighbours(config, (8, 8), copied, np.arange(2))[0]
  assert tiles.shape == (2, 6, 8, 8, 3)
  np.testing.assert_array_equal(tiles[:, 0], copied)
  np.testing.assert_array_equal(tiles[:, 1], copied)
  assert (tiles[:, 2] != copied).any()


@pytest.mark.slow
def test_samples_are_measured_during_training_and_the_best_model_kept(workdirs, tmp_path):
  """WORKDIR/best is a workdir, of the step with the lowest value so far; a resumed run remembers it."""
  experiment = workdirs[0].parent / 'tiny.py'
  command = ['train', f'--config={experiment}:generator', f'--workdir={tmp_path / "w"}',
             f'--config.tokenizer={workdirs[0]}', '--config.measure.every=2', '--config.measure.per_class=1',
             '--config.checkpoint_every=2', '--config.best=-samples/classifier_frechet_distance']
  for steps in (4, 6):
    assert main([*command, f'--config.steps={steps}']) == 0
  lines = [json.loads(line) for line in (tmp_path / 'w/metrics.jsonl').read_text().splitlines()]
  values = {line['step']: line['samples/classifier_frechet_distance'] for line in lines
            if 'samples/classifier_frechet_distance' in line}
  assert list(values) == [2, 4, 6]
  best = max(values, key=values.get)
  assert [p.name for p in (tmp_path / 'w/best/checkpoints').iterdir()] == [str(best)]
  assert var_jax.load(tmp_path / 'w/best').sample([3]).images.shape == (1, 8, 8, 3)


def test_best_of_several_is_what_the_classifier_is_surest_of(workdirs, tmp_path, capsys):
  """With a classifier that finds an image the more its label's the brighter it is."""
  (b,) = export.symbolic_shape('b')
  bright = jax.jit(lambda x: jnp.where(jnp.arange(10) == 3, 0.01, 0.0) * x.astype(jnp.float32).mean((1, 2, 3))[:, None])
  for size in (8, 9):
    artifact = export.export(bright)(jax.ShapeDtypeStruct((b, size, size, 3), jnp.uint8))
    (tmp_path / f'{size}.jaxexport').write_bytes(artifact.serialize())
  command = ['sample', f'--workdir={workdirs[1]}', '--labels=3', '--seed=2', '--top_k=0', f'--out={tmp_path / "x.npz"}']
  assert main([*command, '--num=12']) == 0
  with np.load(tmp_path / 'x.npz') as x:
    images = x['arr_0'].reshape(3, 4, 8, 8, 3)
  wanted = images.mean((2, 3, 4)).argmax(axis=1)
  assert main([*command, '--num=3', '--best_of=4', f'--classifier={tmp_path / "8.jaxexport"}', '--batch_size=12']) == 0
  with np.load(tmp_path / 'x.npz') as x:
    found = x['arr_0']
  assert np.abs(found.astype(int) - images[np.arange(3), wanted]).max() <= 1
  (tmp_path / 'none.jaxexport').write_text('nothing')
  for options, word in ((['--best_of=4'], '--classifier'), (['--classifier=c'], '--best_of'),
                        (['--best_of=2', f'--classifier={tmp_path / "none.jaxexport"}'], 'no readable'),
                        (['--best_of=2', f'--classifier={tmp_path / "9.jaxexport"}'], '8x8')):
    capsys.readouterr()
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and '\n' not in error


# --- images of a data set --------------------------------------------------------------------------------------------


def test_unreadable_image_is_skipped_and_each_is_fitted_as_it_is_read(tmp_path):
  """Of 120 files one is empty; what is kept has the size asked for."""
  for i in range(120):
    (tmp_path / f'c{i % 2}').mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), i, np.uint8)).save(tmp_path / f'c{i % 2}/{i:03d}.png')
  (tmp_path / 'c0/050.png').write_bytes(b'')
  source = open_source('folder', tmp_path, 'train')
  images, labels = zip(*image_sets.SourceImages(source, (8, 8)).labelled(16))
  assert np.concatenate(images).shape == (len(source) - 1, 8, 8, 3)
  assert np.bincount(np.concatenate(labels)).tolist() == (np.bincount(source.labels) - [1, 0]).tolist()
  extractor = fid.Extractor(None, mesh_lib.make_mesh(), lambda batch: {
      'pool': batch['image'].reshape(len(batch['image']), -1)[batch['mask'] > 0, :6].astype('f')})
  gathered = fid.gather_source(source, (8, 8), extractor, most=5)
  assert gathered.count == len(source) - 1 and 4 <= len(gathered.pool_NxD) <= 5
  np.testing.assert_allclose(gathered.pool[0], np.concatenate(images).reshape(len(source) - 1, -1)[:, :6].mean(0))


def test_gathering_keeps_few_rows_and_all_moments():
  rng = np.random.default_rng(0)
  images = image_sets.ArrayImages(rng.integers(0, 256, (100, 4, 4, 3), np.uint8))
  extractor = fid.Extractor(lambda batch: {'pool': batch.reshape(len(batch), -1)[:, :6].astype('f'),
                                           'logits': np.zeros((len(batch), 3))})
  gathering = fid.Gathering(extractor, images.count, most=7)
  for batch in images.batches(gathering.batch_size):
    gathering.add(batch)
  whole, few = fid.gather(images, extractor), gathering.result()
  np.testing.assert_allclose(few.pool[1], whole.pool[1])
  np.testing.assert_array_equal(few.pool_NxD, whole.pool_NxD[np.linspace(0, 99, 7).astype(int)])
  assert few.logits_NxC is None and len(whole.logits_NxC) == 100


def test_identical_sets_have_no_distance():
  rng = np.random.default_rng(0)
  extractor = fid.Extractor(lambda batch: {'pool': batch.reshape(len(batch), -1)[:, :6].astype('f')})
  same = fid.gather(image_sets.ArrayImages(rng.integers(0, 256, (100, 4, 4, 3), np.uint8)), extractor)
  figures = fid.compare(same, same)
  assert figures['fid'] < 1e-6 and figures['precision'] == figures['recall'] == 1
