"""Files and words from outside, mutated at random: whatever they hold, reading them gives a UserError or what they say.

Slow: 2,000 inputs each, the same at every run.
"""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from tiny_runs import ROOT

from var_jax import configs, paths, weights
from var_jax import workdir as workdir_lib
from var_jax.commands import convert, experiment, flags, train
from var_jax.errors import UserError
from var_jax.pyramid import Pyramid

hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies

pytestmark = pytest.mark.slow
many = hypothesis.settings(max_examples=2000, deadline=None, derandomize=True, database=None,
                           suppress_health_check=list(hypothesis.HealthCheck))
TENSORS = {'quantize.embedding.weight': np.ones((3, 2), np.float32), 'b': np.arange(4, dtype=np.int64),
           'none': np.zeros((0, 2), np.float16)}


def as_npz(arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


@st.composite
def mutated(draw, content):
  """Bytes of a file with a few changed, left out, put in, or the rest cut off."""
  data = bytearray(content)
  for _ in range(draw(st.integers(1, 6))):
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    change = draw(st.sampled_from(['byte', 'cut', 'drop', 'insert', 'end']))
    if change == 'byte' and data:
      data[at] = draw(st.integers(0, 255))
    elif change == 'cut':
      del data[at:]
    elif change == 'drop':
      del data[at:at + draw(st.integers(1, 16))]
    elif change == 'insert':
      data[at:at] = draw(st.binary(min_size=1, max_size=16))
    else:
      data += draw(st.binary(min_size=1, max_size=16))
  return bytes(data)


def read(folder, content, name='x.safetensors'):
  """Reads a file of that content as a command would. One line, and nothing but a UserError."""
  (folder / name).write_bytes(content)
  try:
    tensors, _ = weights.inside(weights.read_tensors(folder / name), ('quantize.embedding.weight',), name)
    for tensor in tensors.values():
      np.asarray(tensor).tobytes()
  except UserError as error:
    assert '\n' not in str(error) and len(str(error)) < 1000


@many
@hypothesis.given(content=mutated(safetensors.numpy.save(TENSORS)))
def test_damaged_safetensors(content, tmp_path_factory):
  read(tmp_path_factory.getbasetemp(), content)


NUMBERS = st.one_of(st.integers(-3, 60), st.integers(), st.floats(), st.none(), st.text(max_size=3))
ENTRIES = st.one_of(
    st.fixed_dictionaries({
        'dtype': st.one_of(st.sampled_from([*weights.DTYPES, 'F8_E4M3', 'C64', '']), NUMBERS),
        'shape': st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        'data_offsets': st.one_of(st.tuples(NUMBERS, NUMBERS), st.lists(NUMBERS, max_size=3), NUMBERS)}),
    st.dictionaries(st.text(max_size=5), NUMBERS), NUMBERS)


@many
@hypothesis.given(header=st.dictionaries(st.one_of(st.text(max_size=8), st.just('__metadata__')), ENTRIES, max_size=4),
                  tail=st.binary(max_size=64))
def test_safetensors_with_any_header(header, tail, tmp_path_factory):
  text = json.dumps(header).encode()
  read(tmp_path_factory.getbasetemp(), len(text).to_bytes(8, 'little') + text + tail)


@many
@hypothesis.given(content=mutated(as_npz(TENSORS)))
def test_damaged_npz(content, tmp_path_factory):
  read(tmp_path_factory.getbasetemp(), content, 'x.npz')


@many
@hypothesis.given(content=st.one_of(mutated(as_npz(TENSORS)[40:300]), st.binary(max_size=40)), name=st.text(max_size=9))
def test_npz_with_any_array(content, name, tmp_path_factory):
  """Behind the zip file's own check sums, which would tell of every change."""
  file = io.BytesIO()
  array = io.BytesIO()
  np.save(array, TENSORS['b'])
  with zipfile.ZipFile(file, 'w') as zipped:
    zipped.writestr('good.npy', array.getvalue())
    zipped.writestr(f'{name}.npy', content)
  read(tmp_path_factory.getbasetemp(), file.getvalue(), 'x.npz')


HEADERS = st.one_of(
    st.text(max_size=60), st.fixed_dictionaries({
        'descr': st.one_of(st.sampled_from(['<f4', '|O', '<U9', 'V3', '>c16', [('a', '<i4')], '']), NUMBERS),
        'fortran_order': st.one_of(st.booleans(), NUMBERS),
        'shape': st.one_of(st.lists(NUMBERS, max_size=4).map(tuple), NUMBERS)}).map(repr))


@many
@hypothesis.given(header=HEADERS, version=st.sampled_from([1, 2, 3, 9]), tail=st.binary(max_size=64))
def test_npz_with_any_header(header, version, tail, tmp_path_factory):
  text = header.encode('latin1', 'replace') + b'\n'
  size = len(text).to_bytes(2 if version == 1 else 4, 'little')
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as zipped:
    zipped.writestr('a.npy', b'\x93NUMPY' + bytes([version, 0]) + size + text + tail)
  read(tmp_path_factory.getbasetemp(), file.getvalue(), 'x.npz')


def as_pth(names=('archive/data.pkl', 'archive/data/0', 'archive/version')):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as zipped:
    for name in names:
      zipped.writestr(name, pickle.dumps({'epoch': 3}))
  return file.getvalue()


@many
@hypothesis.given(content=st.one_of(mutated(as_pth()), mutated(pickle.dumps({'a': 1})), st.binary(max_size=40)))
def test_damaged_pth(content, tmp_path_factory):
  """Where PyTorch is not installed, up to where it would be asked."""
  read(tmp_path_factory.getbasetemp(), content, 'x.pth')


@many
@hypothesis.given(index=st.one_of(mutated(b'{"weight_map": {"b": "part.safetensors", "none": "part.safetensors"}}'),
                                  st.recursive(NUMBERS, lambda inner: st.dictionaries(
                                      st.one_of(st.text(max_size=5), st.just('weight_map')), inner, max_size=3),
                                      max_leaves=6).map(lambda x: json.dumps(x).encode())))
def test_index_of_parts(index, tmp_path_factory):
  folder = tmp_path_factory.getbasetemp()
  (folder / 'part.safetensors').write_bytes(safetensors.numpy.save(TENSORS))
  read(folder, index, 'x.safetensors.index.json')


# --- words -----------------------------------------------------------------------------------------------------------

DIGITS = f'{ROOT}/experiments/digits.py'
NAMES = experiment._names(configs.tokenizer())
VALUES = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(
    ['', '()', '(1,2)', '((1,2),(3,4))', '[1,[2]]', '{}', 'None', 'true', '1e3', '0x9', '-1', '1_0', 'nan', '(((']),
    st.lists(st.one_of(st.integers(-2, 40), st.floats(), st.tuples(st.integers(0, 9), st.integers(0, 9)))).map(repr))


def refused_or_done(function, *arguments):
  try:
    return function(*arguments)
  except UserError as error:
    assert '\n' not in str(error) and len(str(error)) < 1000
    return None


@many
@hypothesis.given(
    name=st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES).map(lambda name: name.replace('_', '-')),
                   st.text(max_size=12), st.sampled_from(['model', 'data', 'optimizer', 'stage', '.', '..', 'model.'])),
    value=VALUES, equals=st.booleans())
def test_any_setting(name, value, equals):
  text = f'--config.{name}={value}' if equals else f'--config.{name}'
  config = refused_or_done(flags.read_config, f'{DIGITS}:tokenizer', [text])
  if config and refused_or_done(train.check_numbers, config) is None:
    refused_or_done(workdir_lib.make_tokenizer, config)


@many
@hypothesis.given(text=st.one_of(st.text(max_size=20), st.lists(st.one_of(st.sampled_from(
    ['generator', 'tokenizer', 'depth=', 'runlocal', 'runlocal=maybe', 'size=64', 'x=1']), VALUES)).map(','.join)))
def test_any_argument_of_an_experiment(text):
  found = refused_or_done(lambda: configs.parse_argument(text, depth=4, rate=0.5, name='a', runlocal=False))
  if found:
    assert found[0] in ('tokenizer', 'generator') and {k: type(v) for k, v in found[1].items()} == {
        'depth': int, 'rate': float, 'name': str, 'runlocal': bool}


@many
@hypothesis.given(text=st.one_of(VALUES, st.text('0123456789x,. -', max_size=20),
                                 st.lists(st.integers(-1, 40), max_size=5).map(lambda s: ','.join(map(str, s)))))
def test_any_patch_nums(text):
  try:
    scales = convert._scales(text)
  except convert.argparse.ArgumentTypeError:
    return
  pyramid = refused_or_done(Pyramid.of, scales)
  assert pyramid is None or pyramid.length == sum(h * w for h, w in pyramid.scales) > 0


@many
@hypothesis.given(text=st.one_of(st.text(max_size=30), st.tuples(st.sampled_from(
    ['~', '~/', 'file:', 'file://', 'gs://', 'FILE:///', '~root']), st.text(max_size=9)).map(''.join)))
def test_any_path(text):
  path = refused_or_done(paths.local, text)
  assert path is None or '\0' not in path
  refused_or_done(paths.locals_of, text)
