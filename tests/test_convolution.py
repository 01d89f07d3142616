"""What encoder and decoder do on a CPU in place of the plain convolution, and image after image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import flops, remat
from var_jax.pyramid import Pyramid
from var_jax.tokenizer import convolution
from var_jax.tokenizer.tokenizer import Tokenizer
from var_jax.training import mesh as mesh_lib

HOW = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
PLAIN = ((1, 1), 'SAME')  # strides, padding


def inputs(height=12, width=6, channels=64):
  x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
  return x, jax.random.normal(jax.random.key(1), (3, 3, channels, 64)) / np.sqrt(9 * channels)


# Strips of two rows; of six, and of four for the kernel's gradient; all of it.
@pytest.mark.parametrize('cache', [0, 4 * (2 * 6 * 8 * 64 * 4), 2**23])
def test_fewer_multiplications_give_the_plain_convolution(cache, monkeypatch):
  monkeypatch.setattr(convolution, 'CACHE', cache)
  jax.clear_caches()  # of programs that were traced with another one
  x, kernel = inputs()
  plain = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, *PLAIN, **HOW)
  both = lambda run: jax.jit(lambda *x: (run(*x), *jax.vjp(run, *x)[1](jnp.cos(run(*x)))))(x, kernel)
  for found, expected in zip(both(convolution.winograd), both(plain)):  # what comes out, and the gradients
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('size, kernel, stride, padding', [
    ((8, 6), 3, 1, 'SAME'), ((8, 6), 3, 2, ((0, 1), (0, 1))), ((7, 8), 4, 2, 'SAME'), ((6, 6), 1, 1, 'SAME')])
def test_gradients_of_kernels_are_summed_in_float32_whatever_the_dtype(size, kernel, stride, padding):
  """Of inputs that bfloat16 holds exactly, the kernel's gradient is that of float32, to float32's rounding."""
  exact = lambda i, shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
  x, kernel = exact(0, (2, *size, 5)), exact(1, (kernel, kernel, 5, 7)).astype(jnp.float32)

  def gradients(dtype):
    out, pull_back = jax.vjp(lambda x, kernel: convolution.product(x, kernel, (stride,) * 2, padding, **HOW),
                             x.astype(dtype), kernel)
    assert out.dtype == dtype
    return pull_back(exact(2, out.shape).astype(dtype))

  (to_x, to_kernel), (exact_x, exact_kernel) = gradients(jnp.bfloat16), gradients(jnp.float32)
  assert (to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(to_kernel, exact_kernel, atol=1e-6 * np.abs(exact_kernel).max())
  np.testing.assert_allclose(to_x.astype(jnp.float32), exact_x, atol=2**-8 * np.abs(exact_x).max())


def test_operations_count_as_they_are_written():
  x, kernel = inputs()
  run = lambda *x: jnp.sum(convolution.conv_general_dilated(*x, *PLAIN, train=True, **HOW) ** 2)
  gradients = jax.grad(run, (0, 1))
  written = 3 * 2 * 9 * x.size * 64  # forwards, and the two gradients
  plain = lambda: 'stablehlo.convolution' in jax.jit(gradients).lower(x, kernel).as_text()
  assert flops.counted(gradients, x, kernel) == written and not plain()
  with jax.set_mesh(mesh_lib.make_mesh(jax.devices())):
    assert flops.counted(gradients, x, kernel) == written and plain()


@pytest.mark.parametrize('kind', ['dots', 'pointwise'])
def test_recomputing_keeps_a_convolution_and_not_its_tiles(kind, capsys):
  run = lambda *x: jnp.sum(jnp.sin(convolution.winograd(*x)))
  jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(run, policy=remat.POLICIES[kind]), *inputs())
  kept = [line for line in capsys.readouterr().out.splitlines() if 'from the argument' not in line]
  assert len(kept) == 1 and kept[0].startswith('f32[2,12,6,64]'), kept


@pytest.mark.parametrize('shape, suits', [
    ((12, 6, 64), True), ((12, 7, 64), False), ((12, 6, 32), False), ((1, 1, 64), False)])
def test_only_cpus_take_it_and_only_where_it_fits(shape, suits):
  run = jax.jit(lambda x, kernel: convolution.conv_general_dilated(x, kernel, *PLAIN, train=False, **HOW))
  lowered = lambda platform: run.trace(*inputs(*shape)).lower(lowering_platforms=(platform,)).as_text()
  assert ('stablehlo.convolution' in lowered('cpu')) != suits
  assert 'stablehlo.convolution' in lowered('tpu') and 'stablehlo.convolution' in lowered('cuda')


def test_decoder_takes_it_in_all_3x3_convolutions_of_enough_channels():
  tokenizer = Tokenizer(Pyramid.of((1, 2, 4)), codes=16, channels=8, ch=64, ch_mult=(1, 1), res_blocks=1, groups=4)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  run = jax.jit(functools.partial(tokenizer.apply, method='decode')).trace(variables, jnp.zeros((1, 21), jnp.int32))
  convolutions = lambda on: run.lower(lowering_platforms=(on,)).as_text().count('stablehlo.convolution')
  assert convolutions('tpu') - convolutions('cpu') == 4 + 8 + 1  # middle, two levels of two blocks, and between them


def test_images_one_after_the_other_are_those_of_all_at_once():
  tokenizer = Tokenizer(Pyramid.of((1, 2, 4)), codes=16, channels=8, ch=8, ch_mult=(1, 2), res_blocks=1, groups=4)
  images = jax.random.uniform(jax.random.key(0), (16, 8, 8, 3), minval=-1)
  variables = jax.jit(tokenizer.init)(jax.random.key(1), images[:1])
  encode = lambda tokenizer, images: jax.jit(functools.partial(tokenizer.apply, method='encode'))(variables, images)
  decode = lambda tokenizer, tokens: jax.jit(functools.partial(tokenizer.apply, method='decode'))(variables, tokens)
  tokens = encode(tokenizer, images)
  pictures = decode(tokenizer, tokens)
  slow = tokenizer.clone(at_a_time=1)
  np.testing.assert_array_equal(encode(slow, images), tokens)
  np.testing.assert_allclose(decode(slow, tokens), pictures, atol=1e-5)
  mesh = mesh_lib.make_mesh(jax.devices())
  with jax.set_mesh(mesh):  # each device takes its two images one by one, and none moves
    split = jax.device_put(tokens, mesh_lib.split(mesh))
    run = jax.jit(functools.partial(slow.apply, method='decode'), out_shardings=mesh_lib.split(mesh))
    compiled = run.lower(variables, split).compile()
    assert not any(word in compiled.as_text() for word in ('all-gather', 'all-to-all', 'collective-permute'))
    np.testing.assert_allclose(compiled(variables, split), pictures, atol=1e-5)
