"""What launch/benchmark.py measures and how it compares; its rows' programs are those of other tests."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import ROOT, Line, tiny_config

from var_jax.errors import UserError

sys.path.insert(0, str(ROOT / 'launch'))  # as when it is run
spec = importlib.util.spec_from_file_location('benchmark', ROOT / 'launch/benchmark.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def product(carries=False):
  step = jax.jit(lambda a, b: (a @ b, b.sum()), donate_argnums=0 if carries else ())
  return benchmark.Program(step, (jnp.eye(128), jnp.eye(128)), 4, 2 * 128**3 / 4, carries)


@pytest.mark.parametrize('carries', [False, True])
def test_figures_of_a_program(carries):
  """A training step gives its state away: the next call has to get the one that came back."""
  found = benchmark.measured(product(carries), repeats=3)
  assert found['gflops'] == 2 * 128**3 / 1e9 and found['images_per_second'] == 4 / found['seconds']
  assert found['share_of_product'] == pytest.approx(
      found['gflops_per_second'] / found['product_gflops_per_second'], rel=1e-6)
  assert 0 < found['share_of_product'] < 3 and found['arguments_mib'] == 2 * 128**2 * 4 / 2**20


def test_rows_are_kept_and_compared(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(benchmark, 'ROWS', {'one': product, 'two': product})
  old, new = tmp_path / 'old.json', tmp_path / 'new.json'
  for only in ('one', 'two'):
    benchmark.main([f'--out={old}', f'--only={only}', '--repeats=1'])
  assert json.loads(old.read_text()).keys() == {'one', 'two'}
  slow = {name: row | {'seconds': row['seconds'] * 100} for name, row in json.loads(old.read_text()).items()}
  old.write_text(json.dumps(slow))
  capsys.readouterr()
  benchmark.main([f'--out={new}', '--only=two', f'--against={old}', '--repeats=1', f'--profile={tmp_path}/trace'])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 and 'ratio' in lines[0] and float(lines[2].split('|')[-2].strip(' x')) > 3
  assert list((tmp_path / 'trace/two').rglob('*.xplane.pb'))


@pytest.mark.parametrize('arguments, word', [
    (['--only=nothing'], 'is in no row'), (['--repeats=0'], '--repeats'), (['--against=no.json'], 'no figures'),
    (['--plot=x.svg'], 'ends in .png'), (['--plot=/proc/none/x.png'], '--plot'), (['--out=.'], 'is a folder'),
    (['--profile=setup.py'], '--profile'), (['--against=experiments/pods.jsonl'], 'no figures'),
    (['--against={tmp}/list.json'], 'no rows'), (['--against={tmp}/other.json'], 'no rows'),
    (['--against={tmp}/torch.json'], 'none of the rows'), (['--out={tmp}/torch.json'], 'figures of PyTorch')])
def test_nonsense_is_refused(tmp_path, arguments, word):
  (tmp_path / 'list.json').write_text('[1]')
  (tmp_path / 'other.json').write_text('{"encode, batch 4": {"x": 1}}')
  (tmp_path / 'torch.json').write_text('{"a row": {"seconds": 1, "by": "PyTorch"}}')
  with pytest.raises(UserError, match=word):
    benchmark.main([f'--out={tmp_path}/x.json', *(argument.replace('{tmp}', str(tmp_path)) for argument in arguments)])


def test_comparison_needs_pytorch_and_says_so(tmp_path, monkeypatch):
  import benchmark_torch
  assert benchmark_torch.ROWS.keys() <= benchmark.ROWS.keys()  # or --against would find nothing to compare
  monkeypatch.setattr(benchmark_torch, 'torch', None)
  with pytest.raises(UserError, match='pip install'):
    benchmark_torch.main([f'--out={tmp_path}/x.json'])


def test_rows_without_memory_are_shown():
  found = benchmark.rates(lambda: None, lambda: None, 2, 1e9, repeats=1)
  assert benchmark.benchmark_show.table({'torch': found}, {}).endswith(' % | | |')


def test_digits_row_is_the_real_program():
  program = benchmark.ROWS['digits: sample, batch 64']()
  tokens, images = jax.eval_shape(program.function, *program.arguments)
  assert images.shape == (64, 16, 16, 3) and tokens.shape == (64, 30) and program.flops > 1e6


def test_input_row_compares_with_pillow_alone():
  found = benchmark.benchmark_input.rates(workers=0, repeats=1, count=128, batches=2)
  assert found['share_of_plain'] == found['images_per_second'] / found['plain_images_per_second'] > 0
  assert ' % of Pillow' in benchmark.benchmark_show.table({'input': found}, {})


def test_training_row_compares_the_loop_with_its_step():
  found = benchmark.benchmark_loop.rates(lambda config, steps: Line(steps), tiny_config('tokenizer'), 1, steps=2)
  assert found['share_beyond_step'] == 1 - found['step_seconds'] / found['seconds'] < 1
  assert ' % beyond the step' in benchmark.benchmark_show.table({'training': found}, {})


def test_plot_says_which_rows_it_misses(tmp_path):
  rows = ['sample d16, batch 1, 128 px', 'sample d16, batch 1, 512 px', *(f'sample d16, batch {b}' for b in (1, 4, 16))]
  found = {name: {'seconds': 1.0 + i, 'machine': 'one'} for i, name in enumerate(rows)}
  benchmark.benchmark_show.check_plotted(set(rows))
  benchmark.benchmark_show.plot(found, tmp_path / 'x.png', {128: 155, 256: 680, 512: 2240})
  assert (tmp_path / 'x.png').stat().st_size > 5000
  with pytest.raises(UserError, match='batch 16'):  # before anything is measured
    benchmark.main([f'--out={tmp_path}/x.json', '--only=digits: sample', f'--plot={tmp_path}/y.png'])
