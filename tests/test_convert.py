"""Published checkpoints in and out: the golden numbers through the commands, and files that are not what they seem."""

import importlib.util
import json
import shutil

import golden_files
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_runs import train_both

import var_jax
from var_jax import workdir as workdir_lib
from var_jax.__main__ import main
from var_jax.errors import UserError
from var_jax.interop import architecture, checkpoints, published
from var_jax.pyramid import Pyramid
from var_jax.weights import read_tensors

GENERATORS = ['var', 'var_shared_adaln', 'var_scaled_dot']
SCALES = '--patch_nums=1,2,3,4'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """{model of the manifest: its .safetensors file}."""
  folder = tmp_path_factory.mktemp('published')
  for name in ('vae', *GENERATORS):
    safetensors.numpy.save_file(golden_files.weights(name)[1], folder / f'{name}.safetensors')
  return {name: folder / f'{name}.safetensors' for name in ('vae', *GENERATORS)}


@pytest.fixture(scope='module')
def workdirs(files, tmp_path_factory):
  """{generator of the manifest: the workdir that convert made of it}."""
  folder = tmp_path_factory.mktemp('converted')
  for name in GENERATORS:
    assert convert(files['vae'], files[name], folder / name) == 0
  return {name: folder / name for name in GENERATORS}


def convert(tokenizer, generator, workdir, *options):
  return main(['convert', f'--tokenizer={tokenizer}', f'--generator={generator}', f'--workdir={workdir}', SCALES,
               *options])


def arrays(file):
  with np.load(file) as opened:
    return {name: opened[name] for name in opened.files}


def as_uint8(image_NCHW, low=0.0):
  """Golden pictures as (N, H, W, 3) in 0..255. low: what black is."""
  return (image_NCHW.transpose(0, 2, 3, 1) - low) / (1 - low) * 255


def golden_tokens(golden, prefix):
  return np.concatenate([golden[f'{prefix}_{k}'] for k in range(4)], axis=1)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """The golden images as files."""
  folder = tmp_path_factory.mktemp('pictures')
  for i, image in enumerate(np.rint(as_uint8(golden_files.load('vae')['image'], -1)).astype(np.uint8)):
    Image.fromarray(image).save(folder / f'{i}.png')
  return [folder / '0.png', folder / '1.png']


# --- the golden numbers, through the commands ------------------------------------------------------------------------


@pytest.mark.parametrize('name', GENERATORS)
def test_converted_generator_draws_the_published_pictures(workdirs, tmp_path, name):
  golden = golden_files.load(name)
  labels = ','.join(map(str, golden['labels']))
  assert main(['sample', f'--workdir={workdirs[name]}', f'--labels={labels}', '--top_k=1', '--cfg=1.5',
               f'--out={tmp_path / "x.npz"}']) == 0
  drawn = arrays(tmp_path / 'x.npz')
  np.testing.assert_array_equal(drawn['tokens'], golden_tokens(golden, 'greedy_tokens'))
  assert np.abs(drawn['arr_0'] - as_uint8(golden['greedy_image'])).max() < 1


def test_converted_tokenizer_gives_the_published_tokens(workdirs, pictures, tmp_path):
  golden = golden_files.load('vae')
  assert main(['reconstruct', f'--workdir={workdirs["var"]}', f'--images={pictures[0]},{pictures[1]}',
               f'--out={tmp_path / "x.npz"}']) == 0
  out = arrays(tmp_path / 'x.npz')
  np.testing.assert_array_equal(out['tokens'], golden_tokens(golden, 'tokens'))
  assert np.abs(out['arr_0'] - as_uint8(golden['reconstruction'], -1)).max() < 2
  assert np.abs(out['scales'][:, 0] - as_uint8(golden['reconstruction_scale_0'], -1)).max() < 2


@pytest.mark.parametrize('task, options', [
    ('inpaint', ['--mode=inpaint']), ('outpaint', ['--mode=outpaint']), ('class_edit', ['--label=0'])])
def test_edit_draws_the_published_pictures(workdirs, pictures, tmp_path, task, options):
  golden = golden_files.load('edit')
  assert main(['edit', f'--workdir={workdirs["var"]}', f'--image={pictures[0]}', '--box=16,16,48,48', '--cfg=3',
               '--top_k=1', *options, f'--out={tmp_path / "x.npz"}']) == 0
  edited = arrays(tmp_path / 'x.npz')
  assert edited['labels'].tolist() == [golden[f'{task}/labels'][0]]
  assert np.abs(edited['arr_0'] - as_uint8(golden[f'{task}/image'][:1])).max() < 2


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', GENERATORS)
def test_round_trip_is_bit_identical_and_buffers_come_along(files, workdirs, tmp_path, name):
  assert main(['convert', f'--workdir={workdirs[name]}', f'--to_torch={tmp_path / "out"}']) == 0
  suffix = '.pth' if importlib.util.find_spec('torch') else '.safetensors'
  for kind, source in (('vae', 'vae'), ('var', name)):
    written, original = read_tensors(tmp_path / 'out' / f'{kind}{suffix}'), read_tensors(files[source])
    buffers = {n for n in written if published.BUFFERS.search(n)}
    assert written.keys() - buffers == {n for n in original if not published.BUFFERS.search(n)}
    for tensor in written.keys() - buffers:
      assert written[tensor].dtype == np.float32 and written[tensor].tobytes() == original[tensor].tobytes(), tensor
  depth = golden_files.weights(name)[0]['depth']
  assert buffers == {'lvl_1L', 'attn_bias_for_masking', *(f'blocks.{i}.attn.zero_k_bias' for i in range(depth))}
  assert written['lvl_1L'].tolist() == [[0] + [1] * 4 + [2] * 9 + [3] * 16] and written['lvl_1L'].dtype == np.int64
  mask = written['attn_bias_for_masking'][0, 0]
  assert mask.shape == (30, 30) and mask[1, 5] == -np.inf and mask[5, 1] == mask[1, 4] == 0
  assert convert(tmp_path / f'out/vae{suffix}', tmp_path / f'out/var{suffix}', tmp_path / 'again') == 0
  first, again = workdir_lib.load_generator(workdirs[name]), workdir_lib.load_generator(tmp_path / 'again')
  for i in (1, 3):
    assert workdir_lib.fingerprint(first[i]) == workdir_lib.fingerprint(again[i])


def test_trained_models_leave_and_return(files, tmp_path):
  """A tokenizer alone, at other scales and not square; the shared phis allow any."""
  assert main(['convert', f'--tokenizer={files["vae"]}', f'--workdir={tmp_path / "w"}', '--patch_nums=1,2x3,4x6']) == 0
  tokenizer, params = workdir_lib.load_tokenizer(tmp_path / 'w')
  assert tokenizer.image_size == (64, 96) and tokenizer.pyramid == Pyramid.of((1, (2, 3), (4, 6)))
  assert main(['convert', f'--workdir={tmp_path / "w"}', f'--to_torch={tmp_path / "out"}']) == 0
  assert [file.stem for file in (tmp_path / 'out').iterdir()] == ['vae']


def test_what_a_checkpoint_cannot_hold_comes_along(tmp_path_factory, tmp_path, capsys):
  """The tiny tokenizer has 8 channels, so 8 groups at most; phi and lookup are set apart by hand."""
  _, tokenizer, _ = train_both(tmp_path_factory)
  shutil.copytree(tokenizer, tmp_path / 't')
  config = json.loads((tmp_path / 't/config.json').read_text())
  config['model'] |= {'groups': 4, 'phi_ratio': 0.25, 'normalized_lookup': True}
  (tmp_path / 't/config.json').write_text(json.dumps(config))
  assert main(['convert', f'--workdir={tmp_path / "t"}', f'--to_torch={tmp_path / "out"}']) == 0
  assert 'groups 4, there 32' in capsys.readouterr().err
  file = next((tmp_path / 'out').glob('vae.[ps]*'))
  assert main(['convert', f'--tokenizer={file}', f'--workdir={tmp_path / "w"}', '--patch_nums=1,2,4']) == 0
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  first, again = var_jax.load(tmp_path / 't'), var_jax.load(tmp_path / 'w')
  np.testing.assert_array_equal(first.encode(images), again.encode(images))
  np.testing.assert_array_equal(first.decode(first.encode(images)), again.decode(first.encode(images)))
  (tmp_path / 'out/vae.json').write_text('[')
  assert main(['convert', f'--tokenizer={file}', f'--workdir={tmp_path / "x"}', '--patch_nums=1,2,4']) == 2
  assert 'vae.json' in capsys.readouterr().err


def test_training_checkpoint_gives_both_networks(files, workdirs, tmp_path):
  """As the published trainer saves it: both networks and the optimizer in one file."""
  tensors = {f'trainer.var_wo_ddp.{n}': x for n, x in read_tensors(files['var']).items()}
  tensors |= {f'trainer.vae_local.{n}': x for n, x in read_tensors(files['vae']).items()}
  tensors['trainer.var_opt.state.0.exp_avg'] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / 'ckpt.safetensors')
  assert convert(tmp_path / 'ckpt.safetensors', tmp_path / 'ckpt.safetensors', tmp_path / 'w') == 0
  first, again = workdir_lib.load_generator(workdirs['var']), workdir_lib.load_generator(tmp_path / 'w')
  assert [workdir_lib.fingerprint(first[i]) for i in (1, 3)] == [workdir_lib.fingerprint(again[i]) for i in (1, 3)]


def test_state_dicts_are_found_under_any_prefix(files):
  for kind, file in (('tokenizer', 'vae'), ('generator', 'var')):
    tensors = read_tensors(files[file])
    for prefix in ('module.', 'model._orig_mod.', 'state_dict.', 'ema.', 'a.module.b.'):
      wrapped = {f'{prefix}{name}': value for name, value in tensors.items()} | {'optimizer.x': np.zeros(2, np.float32)}
      safetensors.numpy.save_file(wrapped, files[file].with_name('wrapped.bin'))
      found, where = checkpoints.read(files[file].with_name('wrapped.bin'), kind)
      assert found.keys() == tensors.keys() and f'wrapped.bin, under {prefix!r}' in where


@pytest.mark.parametrize('name', GENERATORS)
def test_architecture_is_read_from_the_tensors(workdirs, name):
  wanted, config = golden_files.weights(name)[0], json.loads((workdirs[name] / 'config.json').read_text())
  model = config['model']
  assert (model['depth'], model['width'], model['heads']) == (wanted['depth'], wanted['embed_dim'], wanted['num_heads'])
  assert (model['classes'], model['mlp_ratio']) == (wanted['num_classes'], wanted['mlp_ratio'])
  assert (model['shared_adaln'], model['normalize_qk']) == (wanted['shared_aln'], wanted['attn_l2_norm'])


@pytest.mark.parametrize('kind, layers, each', [('q_phi1', 1, False), ('q_phi4', 4, False), ('q_phi_each', 4, True)])
def test_sharing_of_phis_is_read_from_their_names(kind, layers, each):
  tensors = golden_files.weights('vae')[1]
  tensors = {n: x for n, x in tensors.items() if 'quant_resi' not in n}
  tensors |= {f'quantize.{n}': x for n, x in golden_files.weights(kind)[1].items() if 'quant_resi' in n}
  config, found = architecture.tokenizer_config(tensors, (1, 2, 3, 4))
  assert (config.model.phi_layers, found) == (layers, each)


def test_published_token_counts_name_their_scales():
  for length, last in ((680, 16), (2240, 32), (9451, 64)):
    scales = architecture.KNOWN_LENGTHS[length]
    tensors = {'pos_1LC': np.zeros((1, length, 1)), 'lvl_embed.weight': np.zeros((len(scales), 1))}
    assert architecture.scales_of(tensors)[-1] == (last, last)


# --- bad input -------------------------------------------------------------------------------------------------------


def changed(source, folder, **changes):
  """A copy of a .safetensors file with tensors replaced, or left out where the change is None."""
  tensors = {n: np.array(x) for n, x in read_tensors(source).items()} | changes
  safetensors.numpy.save_file({n: x for n, x in tensors.items() if x is not None}, folder / 'changed.safetensors')
  return folder / 'changed.safetensors'


@pytest.mark.parametrize('change, word', [
    ({'head.bias': None}, 'missing head.bias'), ({'blocks.1.attn.q_bias': None}, 'missing blocks.1.attn.q_bias'),
    ({'more': np.zeros(2, np.float32)}, 'unexpected more'), ({'head.bias': np.zeros(5, np.float32)}, 'head.bias'),
    ({'head.bias': np.zeros(64, np.int32)}, 'head.bias is of type int32'),
    ({'head.bias': np.full(64, np.nan, np.float32)}, 'head.bias holds NaN'),
    ({'word_embed.weight': None}, 'word_embed.weight'), ({'pos_1LC': np.zeros((1, 29, 192), np.float32)}, '29')])
def test_every_tensor_is_accounted_for(files, tmp_path, capsys, change, word):
  assert convert(files['vae'], changed(files['var'], tmp_path, **change), tmp_path / 'w') == 2
  assert word in one_error(capsys)
  assert [file.name for file in tmp_path.iterdir()] == ['changed.safetensors']  # nothing half-written either


def test_tokenizers_tensors_are_accounted_for_as_well(files, tmp_path, capsys):
  file = changed(files['vae'], tmp_path, **{'decoder.mid.attn_1.q.weight': np.zeros((1, 1), np.float32)})
  assert convert(file, files['var'], tmp_path / 'w') == 2
  assert 'unexpected decoder.mid.attn_1.q.weight' in one_error(capsys) and not (tmp_path / 'w').exists()


def test_errors_name_file_prefix_and_cause(files, tmp_path, capsys):
  tensors = {f'model.{n}': np.array(x) for n, x in read_tensors(files['var']).items()}
  safetensors.numpy.save_file(tensors | {'model.more': np.zeros(2, np.float32)}, tmp_path / 'var.bin')
  assert convert(files['vae'], tmp_path / 'var.bin', tmp_path / 'w') == 2
  error = one_error(capsys)
  assert f"{tmp_path / 'var.bin'}, under 'model.'" in error and 'unexpected more' in error
  safetensors.numpy.save_file({'net.weight': np.zeros(2, np.float32)}, tmp_path / 'other.bin')
  assert convert(files['vae'], tmp_path / 'other.bin', tmp_path / 'w') == 2
  error = one_error(capsys)
  assert 'other.bin holds no generator' in error and 'word_embed.weight' in error and 'net.weight' in error


def one_error(capsys):
  """What the last command said on stderr: one line that begins with 'error: '."""
  error = capsys.readouterr().err.strip()
  assert error.startswith('error: ') and '\n' not in error
  return error


def test_commands_refuse_what_does_not_fit(files, workdirs, tmp_path, capsys):
  html = tmp_path / 'vae.pth'
  html.write_text('<!DOCTYPE html><html>')
  vae, var, new = f'--tokenizer={files["vae"]}', f'--generator={files["var"]}', f'--workdir={tmp_path / "w"}'
  for arguments, word in [
      ([vae, var, new], '--patch_nums'), ([vae, var, new, '--patch_nums=1,2,4'], '--patch_nums'),
      ([vae, var, new, '--patch_nums=1,two'], 'two'), ([vae, var, new, '--patch_nums=1,2,5,0'], 'scales'),
      ([var, new], '--tokenizer'), ([new], '--tokenizer'), ([f'--tokenizer={files["var"]}', new, SCALES], 'generator'),
      ([vae, f'--generator={files["vae"]}', new, SCALES], 'tokenizer'), ([f'--tokenizer={html}', new], 'truncated'),
      ([vae, var, f'--workdir={workdirs["var"]}', SCALES], 'already'), ([vae, var, new, SCALES, '--heads=7'], '7'),
      ([f'--workdir={workdirs["var"]}', '--to_torch='], '--to_torch'),
      ([f'--workdir={workdirs["var"]}', f'--to_torch={html}/x'], 'another --to_torch'),
      ([vae, f'--generator={tmp_path / "none.pth"}', new, SCALES], 'none.pth'),
      ([f'--workdir={tmp_path / "none"}', f'--to_torch={tmp_path / "o"}'], 'no workdir'),
      ([f'--workdir={workdirs["var"]}', f'--to_torch={html}'], 'file'),
      ([vae, f'--workdir={workdirs["var"]}', f'--to_torch={tmp_path / "o"}'], '--tokenizer')]:
    assert main(['convert', *arguments]) == 2, arguments
    assert word in one_error(capsys), arguments
  assert not (tmp_path / 'w').exists()


def test_unknown_number_of_heads_is_asked_for():
  tensors = {n: x for n, x in golden_files.weights('var_scaled_dot')[1].items()}
  tensors['word_embed.weight'] = np.zeros((100, 16))
  with pytest.raises(UserError, match='--heads'):
    architecture.generator_config(tensors)
  assert architecture.generator_config(tensors, 5).model.heads == 5


def test_description_names_both_networks(workdirs):
  assert checkpoints.describe(workdirs['var']) == (
      'a generator of depth 3, 10 classes, and a tokenizer of 64x64 px, 64 codes, 4 scales')
