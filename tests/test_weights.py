"""Weight files come back as they were written, and what is no weight file says so in one line."""

import json
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from var_jax import weights
from var_jax.errors import UserError

TENSORS = {
    'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
    'a.bias': np.array([1.5, -2], ml_dtypes.bfloat16),
    'count': np.array(7, np.int64),
}


def _assert_equal(actual, desired):
  assert actual.keys() == desired.keys()
  for name, value in desired.items():
    assert actual[name].dtype == value.dtype
    np.testing.assert_array_equal(actual[name], value)


def _error(path):
  """The message of the UserError that reading the file raises: one line."""
  with pytest.raises(UserError) as caught:
    weights.read_tensors(path)
  message = str(caught.value)
  assert '\n' not in message and str(path) in message and 'weights_only' not in message
  return message


def test_safetensors_come_back_unchanged(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  numpy.save_file(TENSORS, tmp_path / 'x.safetensors')
  _assert_equal(weights.read_tensors(tmp_path / 'x.safetensors'), TENSORS)


def test_npz_comes_back_unchanged(tmp_path):
  tensors = {name: value for name, value in TENSORS.items() if value.dtype != ml_dtypes.bfloat16}
  np.savez(tmp_path / 'x.npz', **tensors)
  _assert_equal(weights.read_tensors(str(tmp_path / 'x.npz')), tensors)


def test_missing_file_and_unknown_suffix_say_what_to_do(tmp_path):
  assert 'no weight file' in _error(tmp_path / 'x.npz')
  (tmp_path / 'x.ckpt').write_bytes(b'anything')
  assert '.safetensors' in _error(tmp_path / 'x.ckpt')


@pytest.mark.parametrize('suffix', ['.safetensors', '.npz', '.pth', '.pt'])
@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html><html><body>404</body></html>', b'PK\x03\x04' + b'\0' * 60])
def test_foreign_content_is_no_weight_file(tmp_path, suffix, content):
  path = tmp_path / f'x{suffix}'
  path.write_bytes(content)
  assert 'truncated' in _error(path) and 'download it again' in _error(path)


@pytest.mark.parametrize('suffix', ['.safetensors', '.npz'])
@pytest.mark.parametrize('kept', [0.3, 0.9])
def test_truncated_file_is_told(tmp_path, suffix, kept):
  path = tmp_path / f'x{suffix}'
  if suffix == '.npz':
    np.savez(path, a=TENSORS['a.weight'], b=np.zeros(500))
  else:
    pytest.importorskip('safetensors.numpy').save_file({'a': TENSORS['a.weight'], 'b': np.zeros(500)}, path)
  content = path.read_bytes()
  path.write_bytes(content[:int(kept * len(content))])
  assert 'truncated' in _error(path)


def test_pickled_objects_in_npz_are_refused(tmp_path):
  np.savez(tmp_path / 'x.npz', a=np.array([{'an': 'object'}], dtype=object))
  assert 'pickled objects' in _error(tmp_path / 'x.npz')


def test_file_without_tensors_is_told(tmp_path):
  np.savez(tmp_path / 'x.npz')
  assert 'no tensors' in _error(tmp_path / 'x.npz')


def test_without_torch_a_pth_file_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'x.pth').write_bytes(pickle.dumps({}))
  assert "pip install 'var_jax[torch]'" in _error(tmp_path / 'x.pth')


def test_pickle_that_would_call_a_function_is_never_run(tmp_path, monkeypatch):
  """With PyTorch's refusal as it words it, so that the test runs without PyTorch as well."""

  def load(path, *, weights_only, map_location, mmap):
    assert weights_only is True
    raise pickle.UnpicklingError('Weights only load failed. Re-running with `weights_only` set to `False` will do.\n'
                                 'WeightsUnpickler error: Unsupported global: GLOBAL posix.system was not allowed')

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=load))
  (tmp_path / 'x.pth').write_bytes(pickle.dumps({}))
  assert 'would call posix.system' in _error(tmp_path / 'x.pth')


class _Payload:
  """Unpickled carelessly, it creates a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


@pytest.mark.parametrize('zip_format', [True, False])
def test_torch_files_give_dotted_names_and_run_nothing(tmp_path, zip_format):
  torch = pytest.importorskip('torch')
  tensors = {name: torch.from_numpy(value) for name, value in TENSORS.items() if value.dtype != ml_dtypes.bfloat16}
  tensors['a.bias'] = torch.tensor([1.5, -2], dtype=torch.bfloat16)
  torch.save({'model': {'vae': tensors}, 'epoch': 3}, tmp_path / 'x.pth', _use_new_zipfile_serialization=zip_format)
  expected = {f'model.vae.{name}': value for name, value in TENSORS.items()}
  _assert_equal(weights.read_tensors(tmp_path / 'x.pth'), expected)
  content = (tmp_path / 'x.pth').read_bytes()
  (tmp_path / 'cut.pth').write_bytes(content[:len(content) * 2 // 3])
  assert 'truncated' in _error(tmp_path / 'cut.pth')
  evil = {'a': torch.ones(2), 'b': _Payload(tmp_path / 'ran')}
  torch.save(evil, tmp_path / 'evil.pth', _use_new_zipfile_serialization=zip_format)
  assert 'would call' in _error(tmp_path / 'evil.pth')
  assert not (tmp_path / 'ran').exists()


def test_accounting_names_every_deviation():
  tensors = {name: value for name, value in TENSORS.items() if name != 'count'} | {'more': np.zeros(1)}
  shapes = {'a.weight': (3, 2), 'a.bias': (2,), 'count': ()}
  with pytest.raises(UserError, match=r'of a model: missing count; unexpected more; misshapen a.weight \(2, 3\)'):
    weights.match_shapes(tensors, shapes, 'a model')
  _assert_equal(weights.match_shapes(TENSORS, {name: value.shape for name, value in TENSORS.items()}, 'm'), TENSORS)


def test_a_long_account_is_cut_short():
  shapes = {f'layer{i}': (2,) for i in range(31)}
  with pytest.raises(UserError, match='missing layer0, layer1, layer2, layer3, layer4, layer5 and 25 more: get'):
    weights.match_shapes({}, shapes, 'a model', 'get the right file')


# --- told by content, in several files, under other names ------------------------------------------------------------

PLAIN = {'a.weight': np.arange(6, dtype=np.float32), 'b.weight': np.ones(2, np.float32)}


@pytest.mark.parametrize('suffix', ['.bin', '.ckpt', '.pt', '', '.weights'])
def test_content_tells_the_kind_of_file(tmp_path, suffix):
  pytest.importorskip('safetensors.numpy').save_file(PLAIN, tmp_path / f's{suffix}')
  _assert_equal(weights.read_tensors(tmp_path / f's{suffix}'), PLAIN)
  np.savez(tmp_path / 'n.npz', **PLAIN)
  (tmp_path / 'n.npz').rename(tmp_path / f'n{suffix}')
  _assert_equal(weights.read_tensors(tmp_path / f'n{suffix}'), PLAIN)


@pytest.mark.parametrize('suffix', ['.bin', '.ckpt'])
@pytest.mark.parametrize('zip_format', [True, False])
def test_pytorch_files_of_any_name_go_to_pytorch(tmp_path, monkeypatch, suffix, zip_format):
  """Told without PyTorch, so that what is missing is named."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / f'x{suffix}'
  if zip_format:
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr('archive/data.pkl', pickle.dumps({}))
  else:
    path.write_bytes(pickle.dumps({}))
  assert "pip install 'var_jax[torch]'" in _error(path)


@pytest.mark.parametrize('content, words', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'), (b'\x89HDF\r\n\x1a\n' * 4, 'HDF')])
def test_what_a_foreign_file_is_is_told(tmp_path, content, words):
  (tmp_path / 'x.safetensors').write_bytes(content)
  assert words in _error(tmp_path / 'x.safetensors') or 'truncated' in _error(tmp_path / 'x.safetensors')
  (tmp_path / 'x.bin').write_bytes(content)
  assert words in _error(tmp_path / 'x.bin')


def in_parts(folder):
  """A model in two files and their index."""
  save = pytest.importorskip('safetensors.numpy').save_file
  for i, name in enumerate(PLAIN):
    save({name: PLAIN[name]}, folder / f'model-{i}.safetensors')
  parts = {name: f'model-{i}.safetensors' for i, name in enumerate(PLAIN)}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': parts}))
  return folder / 'model.safetensors.index.json'


def test_model_in_several_files_is_read_by_its_index_or_folder(tmp_path):
  index = in_parts(tmp_path)
  _assert_equal(weights.read_tensors(index), PLAIN)
  _assert_equal(weights.read_tensors(tmp_path), PLAIN)
  index.unlink()
  assert 'has 2 weight files, such as model-0.safetensors' in _error(tmp_path)
  (tmp_path / 'model-1.safetensors').unlink()
  _assert_equal(weights.read_tensors(tmp_path), {'a.weight': PLAIN['a.weight']})
  (tmp_path / 'model-0.safetensors').unlink()
  assert 'folder without weights' in _error(tmp_path)


@pytest.mark.parametrize('content, words', [
    ('{"weight_map": {"a.weight": "gone.safetensors"}}', 'gone.safetensors is not there'),
    ('{"weight_map": {"c.weight": "model-0.safetensors"}}', 'lacks c.weight'), ('[', 'index'), ('{}', 'weight_map'),
    ('{"weight_map": [1]}', 'weight_map'), ('{"weight_map": {"a": 3}}', 'weight_map'),
    ('{"weight_map": {"a": "../a"}}', 'weight_map'), ('{"weight_map": {"a": [1]}}', 'weight_map')])
def test_broken_index_is_told(tmp_path, content, words):
  index = in_parts(tmp_path)
  index.write_text(content)
  with pytest.raises(UserError, match=words):
    weights.read_tensors(index)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'state_dict.', 'ema.', 'model.module.',
                                    'state_dict.model._orig_mod.', 'trainer.vae_local.'])
def test_network_is_found_under_its_prefix(prefix):
  tensors = {f'{prefix}{name}': value for name, value in PLAIN.items()} | {'epoch': np.zeros(())}
  found, where = weights.inside(tensors, ('b.weight',), 'x.pth')
  _assert_equal(found, PLAIN)
  assert where == prefix


def test_wrapped_parts_of_a_network_get_their_own_names():
  found, _ = weights.inside({'m.blocks.0._orig_mod.a.weight': 1, 'm.b.weight': 2}, ('b.weight',), 'x')
  assert dict(found) == {'blocks.0.a.weight': 1, 'b.weight': 2}


def test_average_is_taken_where_a_file_has_both_and_that_is_said(capsys):
  tensors = {f'{part}.{name}': i for i, part in enumerate(('model', 'ema', 'optimizer.exp_avg')) for name in PLAIN}
  found, prefix = weights.inside(tensors, ('b.weight',), 'x.pth')
  assert dict(found) == dict.fromkeys(PLAIN, 1) and prefix == 'ema.'
  assert "x.pth holds the network more than once, under 'ema.', 'model.': 'ema.' is taken" in capsys.readouterr().err
