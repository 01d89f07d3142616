"""A run's own files with anything in them: they are read, or refused in a line, and nothing that is whole is lost."""

import json
import math
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from var_jax import configs, workdir
from var_jax.errors import UserError
from var_jax.training import metrics

pytestmark = pytest.mark.slow
many = settings(max_examples=2000, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))

LINES = [json.dumps({'step': step, 'train/loss': 1.5 / step, 'validation/psnr': None, 'train/skipped': 0})
         for step in range(1, 9)]
CONFIGS = {stage: json.dumps(json.loads(getattr(configs, stage)().to_json()), indent=2)
           for stage in ('tokenizer', 'generator')}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@st.composite
def mutated_bytes(draw, text):
  """A text with some stretches removed, replaced by others, or repeated; sometimes cut short."""
  content = text.encode()
  for _ in range(draw(st.integers(1, 4))):
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(start + 40, len(content))))
    new = draw(st.binary(max_size=8) | st.sampled_from(
        [b'', b'\n', b'{', b'[' * 3000, b'}', b'"', b'null', b'NaN', b'1e999', b'-1', b'9' * 5000,
         content[start:end] * 2]))
    content = content[:start] + new + content[end:]
  return content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@st.composite
def mutated_json(draw, text):
  """JSON with some values, or names, replaced by anything."""
  value = json.loads(text)
  for _ in range(draw(st.integers(1, 3))):
    place = value
    while True:
      name = draw(st.sampled_from(sorted(place)))
      if not (isinstance(place[name], dict) and place[name]) or draw(st.booleans()):
        break
      place = place[name]
    if draw(st.booleans()):
      place[draw(st.text(max_size=8))] = place.pop(name)
    else:
      place[name] = draw(anything)
  return json.dumps(value).encode()


def mutated(text):
  return mutated_bytes(text) | mutated_json(text)


@st.composite
def mutated_lines(draw):
  lines = [draw(mutated(line)) if draw(st.integers(0, 3)) == 0 else line.encode() for line in LINES]
  return b'\n'.join(lines) if draw(st.booleans()) else draw(mutated_bytes('\n'.join(LINES)))


@many
@given(mutated_lines())
def test_any_metrics_are_read_and_gone_on_with(tmp_path_factory, content):
  folder = tmp_path_factory.getbasetemp() / 'metrics'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  path = folder / 'metrics.jsonl'
  path.write_bytes(content)
  series = metrics.read(path)
  assert all(type(step) is int and math.isfinite(value) for row in series.values() for step, value in row)
  writer = metrics.Writer(folder, 5)
  writer.scalars(6, {'train/loss': 1.0})
  writer.close()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert all(row['step'] <= 5 for row in rows[:-1]) and rows[-1] == {'step': 6, 'train/loss': 1.0}
  whole = [json.loads(line) for line in content.decode(errors='replace').splitlines() if line in LINES[:5]]
  assert [row for row in rows if row in whole] == whole


@many
@given(st.sampled_from(sorted(CONFIGS)).flatmap(lambda stage: st.tuples(st.just(stage), mutated(CONFIGS[stage]))))
def test_any_config_is_read_or_refused(tmp_path_factory, case):
  stage, content = case
  folder = tmp_path_factory.getbasetemp() / 'config'
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_bytes(content)
  try:
    config = workdir.read_config(folder)
  except UserError as error:
    assert 'config.json' in str(error)
    return
  default = getattr(configs, config.stage)()
  for name, value in default.items():
    assert type(config[name]) is type(value), name
    if isinstance(value, ConfigDict):
      assert {key: type(x) for key, x in config[name].items() if key in value} == {
          key: type(x) for key, x in value.items()}
  (folder / 'config.json').write_text(config.to_json())
  assert workdir.check_config(folder, config) == []
  try:
    assert isinstance(workdir.check_config(folder, default), list)
  except UserError as error:
    assert 'other settings' in str(error)
