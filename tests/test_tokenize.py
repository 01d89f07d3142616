"""Token pyramids on disk: what `tokenize` writes, and that training on them is training on the images."""

import json

import numpy as np
import pytest
from tiny_runs import metrics_of, train_both

import var_jax
from var_jax.__main__ import main
from var_jax.data import tokens as tokens_lib
from var_jax.data.images import fit
from var_jax.data.sources import open_source, summary

WHOLE = ['--config.data.enlarge=1']  # no crops


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return train_both(tmp_path_factory)


def tokenize(trained, out, *flags):
  return main(['tokenize', f'--config={trained[0]}:generator', f'--workdir={trained[1]}', f'--out={out}', *flags])


@pytest.fixture(scope='module')
def made(trained, tmp_path_factory):
  """Tokens of the digits in files of 400 images, without crops."""
  out = tmp_path_factory.mktemp('made') / 'tokens'
  with pytest.MonkeyPatch.context() as small:
    small.setattr(tokens_lib, 'PER_SHARD', 400)
    assert tokenize(trained, out, *WHOLE) == 0
    yield out


def test_tokens_are_those_of_the_images_in_their_order(trained, made):
  assert sorted(p.name for p in made.glob('[!.]*')) == [
      'tokens.json', *(f'train-{i:05d}-of-00004.array_record' for i in range(4)),
      'validation-00000-of-00001.array_record']
  model, size = var_jax.load(trained[1]), (8, 8)
  for split, count in (('train', 1500), ('validation', 297)):
    images, source = open_source('digits', split=split), tokens_lib.TokenSource(made, split)
    assert len(source) == len(images) == count and len(source.class_names) == 10
    rows = [0, 1, count // 2, count - 1]
    expected = model.encode(np.stack([fit(images[i][0], size, enlarge=1) for i in rows]))
    for i, tokens_L in zip(rows, expected):
      tokens_CxL, label = source[i]
      assert label == images[i][1] and tokens_CxL.shape == (1, 21) and np.array_equal(tokens_CxL[0], tokens_L)


def test_training_on_tokens_is_training_on_images(trained, made, tmp_path):
  for name, data in (('images', WHOLE), ('tokens', [*WHOLE, '--config.data.source=tokens',
                                                    f'--config.data.path={made}'])):
    assert main(['train', f'--config={trained[0]}:generator', f'--workdir={tmp_path / name}', *data,
                 f'--config.tokenizer={trained[1]}', '--config.eval_every=4', '--config.steps=4']) == 0
  lines = [{(line['step'], name): value for line in metrics_of(tmp_path / which) for name, value in line.items()
            if 'per_second' not in name} for which in ('images', 'tokens')]
  assert lines[0] == pytest.approx(lines[1], rel=1e-5) and (4, 'validation/loss') in lines[0]


def test_what_a_run_says_of_its_tokens_takes_no_read_of_each(made, monkeypatch):
  """It is said at every start; labels are read where images are chosen by them."""
  train, validation = (tokens_lib.TokenSource(made, split) for split in ('train', 'validation'))
  labels = validation.read_labels()
  assert labels.tolist() == [validation[i][1] for i in range(len(validation))]
  monkeypatch.setattr(tokens_lib.TokenSource, '__getitem__', lambda *_: pytest.fail('read'))
  assert summary(train, validation).startswith('data: 1,500 images to train on, 297 held out')


def test_crops_differ_and_an_epoch_takes_one_at_random(trained, tmp_path):
  assert tokenize(trained, tmp_path / 'a', '--crops=3', '--batch_size=100') == 0  # 100 is no multiple of 3
  assert tokenize(trained, tmp_path / 'b', '--crops=3', '--batch_size=64') == 0
  source, again = (tokens_lib.TokenSource(tmp_path / name, 'train') for name in 'ab')
  tokens_CxL, _ = source[700]
  assert tokens_CxL.shape == (3, 21) and np.array_equal(tokens_CxL, again[700][0])
  assert np.mean([(source[i][0][0] != source[i][0][1]).any() for i in range(50)]) > 0.5
  from var_jax.data import pipeline
  batches = pipeline.train_batches(source, batch_size=500, size=(8, 8), seed=0)
  drawn = np.concatenate([next(batches)['tokens'] for _ in range(3)])
  batches.close()
  firsts = {source[i][0][0].tobytes() for i in range(len(source))}
  assert 0.2 < np.mean([row.tobytes() in firsts for row in drawn]) < 0.7


def test_what_is_missing_is_made_again(trained, made, capsys):
  before = {path.name: path.read_bytes() for path in made.iterdir()}
  (made / 'train-00002-of-00004.array_record').unlink()
  assert main(['train', f'--config={trained[0]}:generator', f'--workdir={made}/w', f'--config.tokenizer={trained[1]}',
               '--config.data.source=tokens', f'--config.data.path={made}']) == 2
  assert '1 of 4 files are missing' in capsys.readouterr().err and not (made / 'w').exists()
  assert tokenize(trained, made, *WHOLE) == 0
  source = tokens_lib.TokenSource(made, 'train')
  assert {path.name for path in made.iterdir()} == set(before) and len(source) == 1500


@pytest.mark.parametrize('flags, word', [
    (['--crops=2'], 'crops is another'), (['--config.seed=5', '--config.data.enlarge=2'], 'seed, enlarge'),
    (['--crops=0'], '--crops'), (['--batch_size=-1'], '--batch_size'),
    (['--config.data.source=tokens', '--config.data.path=.'], 'needs images'), (['--config.seed=-1'], 'seed is -1'),
    (['--config.data.workers=-1'], 'data.workers'), (['--out=README.md'], 'cannot write')])
def test_nonsense_is_refused(trained, made, capsys, flags, word):
  assert tokenize(trained, made, *WHOLE, *flags) == 2
  error = capsys.readouterr().err.strip().rpartition(': the last one counts\n')[2]  # WHOLE has some flags already
  assert error.startswith('error: ') and word in error and '\n' not in error


def test_tokens_of_another_tokenizer_are_refused(trained, made, tmp_path, capsys):
  other = tmp_path / 'other'
  other.mkdir()
  for path in made.iterdir():
    (other / path.name).write_bytes(path.read_bytes())
  description = json.loads((other / 'tokens.json').read_text())
  train = ['train', f'--workdir={tmp_path / "w"}', f'--config.tokenizer={trained[1]}', '--config.data.source=tokens',
           f'--config.data.path={other}']
  for change in ({'tokenizer': 'another'}, {'scales': [[1, 1], [2, 4], [3, 4]]}):
    (other / 'tokens.json').write_text(json.dumps(description | change))
    assert main([*train, f'--config={trained[0]}:generator']) == 2
    assert 'made by another tokenizer' in capsys.readouterr().err
  (other / 'tokens.json').write_text(json.dumps(description))
  assert main([*train, f'--config={trained[0]}:generator', '--config.measure.every=4']) == 2
  assert 'measure.every' in capsys.readouterr().err
  (other / 'validation-00000-of-00001.array_record').write_bytes(b'\0' * 1000)
  assert main([*train, f'--config={trained[0]}:generator']) == 2
  assert 'cannot read the validation tokens' in capsys.readouterr().err
  assert main([*(flag for flag in train if 'config.tokenizer' not in flag), f'--config={trained[0]}:tokenizer']) == 2
  assert 'needs images' in capsys.readouterr().err
  (other / 'tokens.json').write_text('{')
  assert main([*train, f'--config={trained[0]}:generator']) == 2
  assert '`var-jax tokenize` has made' in capsys.readouterr().err and not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_tokens_are_bound_to_all_images_and_those_of_earlier_commits_stay(trained, tmp_path, capsys):
  """An interrupted `tokenize` must not go on with images that have changed, whichever of them did."""
  images, out = tmp_path / 'images.npz', tmp_path / 'tokens'
  pixels, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
  flags = ['--config.data.source=arrays', f'--config.data.path={images}']
  np.savez(images, images=pixels, labels=labels)
  assert tokenize(trained, out, *flags) == 0 and tokenize(trained, out, *flags) == 0
  pixels[11] = 0
  np.savez(images, images=pixels, labels=labels)
  capsys.readouterr()
  assert tokenize(trained, out, *flags) == 2
  assert 'data is another' in capsys.readouterr().err
  made = json.loads((out / 'tokens.json').read_text())
  del made['data']
  (out / 'tokens.json').write_text(json.dumps(made))
  assert tokenize(trained, out, *flags) == 0
  assert main(['train', f'--config={trained[0]}:generator', f'--workdir={tmp_path / "w"}', '--config.steps=1',
               f'--config.tokenizer={trained[1]}', '--config.data.source=tokens', f'--config.data.path={out}']) == 0
