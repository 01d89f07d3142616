"""What a program costs, counted in its text and by formula; the check that compiles for chips that are not there."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_runs import ROOT, write_experiment

from var_jax import flops
from var_jax.errors import UserError
from var_jax.generator import attention
from var_jax.generator.transformer import Generator
from var_jax.pyramid import Pyramid
from var_jax.training import hlo
from var_jax.training import mesh as mesh_lib

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')


def cost_of(function, *arguments):
  return hlo.count(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_in_loops_count_as_often_as_they_run():
  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  once = 2 * 8 * 16 * 16
  assert cost_of(lambda x, w: x @ w[0], x, w).flops == once
  assert cost_of(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w).flops == 5 * once
  dearer = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1] @ w[2], lambda: x @ w[0])
  assert cost_of(dearer, x, w).flops == 3 * once
  assert flops.counted(dearer, x, w) == 3 * once


def test_slices_and_updates_move_what_they_touch():
  """A loop over stacked arrays reads and writes each row once, not the whole stack in every turn."""
  x = jnp.ones((64, 256, 256))
  moved = cost_of(lambda x: jax.lax.scan(lambda c, row: (c + row.sum(), jnp.sin(row) * c), 0.0, x), x).bytes
  assert 2 * x.nbytes <= moved < 8 * x.nbytes, moved / x.nbytes


def test_bytes_are_those_of_the_main_memory():
  """What the compiler keeps in a TPU's core moves nothing: here one array comes in, and goes out again by a copy."""
  text = '''%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %sine = f32[8,128]{1,0:T(8,128)S(1)} sine(%p)
}
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %g = f32[8,128]{1,0:T(8,128)S(1)} cosine(%f)
  %s = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%g)
  ROOT %d = f32[8,128]{1,0:T(8,128)} copy-done(%s)
}'''
  assert hlo.count(text).bytes == 2 * 4 * 8 * 128


def test_kernels_count_the_tiles_that_they_visit():
  """Their own text is no HLO. 680 tokens are filled up to three tiles of 256, of whose nine pairs two are hidden."""
  counts = attention.kernel_flops(Pyramid.of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 64)
  product = 7 * 2 * 256 * 256 * 64
  assert counts == {'splash_mha_fwd': 2 * product, 'splash_mha_dkv': 5 * product}
  text = '''ENTRY %main (m: s8[1,2,2], q: bf16[4,8,768,64]) -> bf16[4,8,768,64] {
  %m = s8[1,2,2]{2,1,0} parameter(0)
  %q = bf16[4,8,768,64]{3,2,1,0} parameter(1)
  %splash_mha_fwd.3 = bf16[4,8,768,64]{3,2,1,0} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
  ROOT %other.1 = bf16[4,8,768,64]{3,2,1,0} custom-call(%splash_mha_fwd.3), custom_call_target="tpu_custom_call"
}'''
  assert hlo.count(text, counts).flops == 4 * 8 * 2 * product and hlo.count(text).flops == 0
  single = text.replace('[4,8,768,64]{3,2,1,0}', '[8,768,64]{2,1,0}').replace('[4,8,768,64]', '[8,768,64]')
  assert hlo.count(single, counts).flops == 8 * 2 * product  # one image: XLA drops its axis


def test_loops_of_compiled_programs_are_understood():
  """One whose counter goes up in twos, and a kernel in its body whose text takes several lines."""
  text = '''%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  %end = s32[] constant(8)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}
%body (p.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.1 = (s32[], f32[8,8]) parameter(0)
  %two = s32[] constant(2)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p.1), index=1
  %kernel.1 = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"block": "8"
}}, metadata={op_name="kernel"}
  %product = f32[8,8]{1,0} dot(%kernel.1, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = s32[] add(%i.1, %two)
  ROOT %out = (s32[], f32[8,8]) tuple(%next, %product)
}
ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]) parameter(0)
  ROOT %loop = (s32[], f32[8,8]) while(%a), condition=%condition, body=%body
}'''
  assert hlo.count(text).flops == 4 * 2 * 8**3


def test_slices_inside_fusions_are_all_that_is_read():
  """Through a bitcast and a fusion in the fusion; a buffer that is only allocated moves nothing."""
  text = '''%inner (q: f32[64,128], j: s32[]) -> f32[1,128] {
  %q = f32[64,128]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%q, %j, %zero), dynamic_slice_sizes={1,128}
}
%outer (p: f32[8,8,128], i: s32[]) -> f32[1,128] {
  %p = f32[8,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[64,128]{1,0} bitcast(%p)
  ROOT %row = f32[1,128]{1,0} fusion(%flat, %i), kind=kLoop, calls=%inner
}
ENTRY %main (a: f32[8,8,128], b: s32[]) -> f32[1,128] {
  %a = f32[8,8,128]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %room = f32[8,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (f32[8,8,128]{2,1,0}, f32[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:8], [0:128]}
  ROOT %row.1 = f32[1,128]{1,0} fusion(%a, %b), kind=kLoop, calls=%outer
}'''
  assert hlo.count(text).bytes == 4 * 8 * 128 + 2 * 4 * 128 + 4  # the slice, a row in and out, and the index


def test_collective_beside_other_work_counts_once():
  """It stands in its own fusion and in that of the work, under one channel; how many take part is named by axes."""
  gather = "all-gather(%{0}), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=16] {{'axis_1'}}"
  fused = '''%start (p: f32[8,128]) -> f32[128,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %g = f32[128,128]{1,0} ''' + gather.format('p') + '''
  ROOT %s = f32[128,128]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%work (q: f32[8,128]) -> f32[128,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %h = f32[128,128]{1,0} ''' + gather.format('q') + '''
}
ENTRY %main (a: f32[8,128]) -> f32[128,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[128,128]{1,0} fusion(%a), kind=kCustom, calls=%start
  ROOT %c = f32[128,128]{1,0} fusion(%a), kind=kCustom, calls=%work
}'''
  assert hlo.count(fused).sent == {'all-gather': 15 * 4 * 8 * 128}


def test_convolutions_count_what_they_see():
  """Padding and the holes of strided gradients are no work: forward, by the image, and by the kernel."""
  x, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))
  conv = lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  once = 2 * (2 * 4 * 4 * 4) * 27
  assert flops.counted(conv, x, kernel) == once
  text = '''ENTRY %main (a: f32[2,9,9,3], b: f32[3,3,3,4]) -> f32[2,4,4,4] {
  %a = f32[2,9,9,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,4]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,4,4,4]{3,2,1,0} convolution(%a, %b), window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f
}'''
  assert hlo.count(text).flops == once
  padded = text.replace('size=3x3 stride=2x2', 'size=3x3 stride=3x3 pad=1_1x1_1')
  assert hlo.count(padded).flops == 2 * (2 * 4) * 3 * (9 * 9)  # every pixel is seen once
  product = '''ENTRY %main (a: f32[1,4,2,3,5], b: f32[7,2,3,5,1]) -> f32[1,4,7,1,1] {
  %a = f32[1,4,2,3,5]{4,3,2,1,0} parameter(0)
  %b = f32[7,2,3,5,1]{4,3,2,1,0} parameter(1)
  ROOT %c = f32[1,4,7,1,1]{4,3,2,1,0} convolution(%a, %b), window={size=2x1x3}, dim_labels=1b02f_o02i1->1bf20
}'''
  assert hlo.count(product).flops == 2 * 4 * 7 * (2 * 3 * 5)  # windows lie in the order of their dimensions' numbers


def test_collectives_are_weighed():
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((8, 1024)), mesh_lib.split(mesh))
    cost = cost_of(jax.shard_map(lambda x: jax.lax.psum(x, 'data'), in_specs=P('data'), out_specs=P()), x)
  assert cost.sent == {'all-reduce': 2 * 4096 * 7 / 8}


def test_formula_of_the_generator_is_what_it_computes():
  """Published scales: beyond the formula there is only what a mask hides among the coarse scales, under 5 %."""
  for shared in (False, True):
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    generator = Generator(Pyramid.of(scales), depth=2, width=256, heads=4, shared_adaln=shared)
    teacher = jax.ShapeDtypeStruct((1, 679, 32), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(generator.init, jax.random.key(0), labels, teacher)
    ratio = flops.counted(generator.apply, params, labels, teacher) / flops.generator_forward(generator)
    assert 1 <= ratio < 1.05, ratio


def check(*options, timeout=500):
  return subprocess.run([sys.executable, 'launch/compile_check.py', *options], cwd=ROOT, capture_output=True, text=True,
                        timeout=timeout)


def test_sampler_is_lowered_for_gpus(tmp_path):
  experiment = write_experiment(tmp_path)
  ran = check(f'--config={experiment}:generator', '--program=sample', '--platform=cuda')
  assert ran.returncode == 0 and 'lowered for cuda' in ran.stdout, ran.stderr


@pytest.mark.parametrize('options, word', [
    (['--topology=v9:2x2'], 'v4, v5e'), (['--topology=v5e:0x4'], 'is none'), (['--topology=v5e'], 'is none'),
    (['--per_device=0', '--program=sample'], '--per_device=0')])
def test_nonsense_is_refused(tmp_path, monkeypatch, options, word):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '')  # which the import would leave set
  monkeypatch.syspath_prepend(ROOT / 'launch')
  with pytest.raises(UserError, match=word):
    __import__('compile_check').main([f'--config={write_experiment(tmp_path)}:generator', *options])


def test_topology_that_does_not_exist_is_refused(tmp_path):
  """In a process of its own: a libtpu that this one loads is not there for those of other tests."""
  ran = check(f'--config={write_experiment(tmp_path)}:generator', '--topology=v5e:5x77')
  assert ran.returncode == 2 and 'cannot be had' in ran.stderr, ran.stderr


def test_table_shows_what_a_file_of_results_has(tmp_path, monkeypatch, capsys):
  monkeypatch.syspath_prepend(ROOT / 'launch')
  compile_table = __import__('compile_table')
  show = lambda path: compile_table.main([f'--results={path}', '--show'])
  line = next(line for line in (ROOT / 'experiments/pods.jsonl').read_text().splitlines() if '"d16: train"' in line)
  (tmp_path / 'some.jsonl').write_text(f'garbage\n{{"a": 1}}\n[1, 2]\n{line}\n{line[:99]}')
  show(tmp_path / 'some.jsonl')
  row, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| d16: train')]
  assert row.count('%') == 2, row
  (tmp_path / 'bytes.jsonl').write_bytes(bytes(range(256)))
  (tmp_path / 'other.jsonl').write_text('{"a": 1}\n')
  for bad in ('bytes.jsonl', '', 'none.jsonl', 'other.jsonl'):
    with pytest.raises(UserError, match='--results'):
      show(tmp_path / bad)


@needs_libtpu
@pytest.mark.parametrize('attention, least, most', [
    ('xla', 0.9, 1.05), ('auto', 3, 5)])  # the kernel fills 21 tokens up to a tile of 128
def test_program_is_compiled_for_a_pod(tmp_path, attention, least, most):
  experiment = write_experiment(tmp_path)
  ran = check(f'--config={experiment}:generator', '--topology=v5e:4x4', '--config.batch_size=16', '--json',
              f'--config.attention={attention}')
  found = __import__('json').loads(ran.stdout.splitlines()[-1])
  assert ran.returncode == 0 and found['fits'] and found['chips'] == 16, ran.stderr
  assert least < found['over_ideal'] < most and np.isfinite(found['mfu_ceiling'])
