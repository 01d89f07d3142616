"""Editing by box and mask, and reconstruction of whole folders, through the commands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_runs import train_both

import var_jax
from var_jax.__main__ import main
from var_jax.data.images import fit, read_image
from var_jax.errors import UserError
from var_jax.generator.transformer import Generator
from var_jax.model import Model
from var_jax.pyramid import Pyramid
from var_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  _, tokenizer, generator = train_both(tmp_path_factory)
  return tokenizer, generator


@pytest.fixture(scope='module')
def image(tmp_path_factory):
  """A picture of the model's size and masks for it: white where rows and columns are 2 to 3."""
  folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / 'a.png')
  mask = np.zeros((8, 8), np.uint8)
  mask[2:4, 2:4] = 255
  Image.fromarray(mask).save(folder / 'mask.png')
  Image.fromarray(mask[:7]).save(folder / 'small.png')
  Image.fromarray(mask * 0).save(folder / 'black.png')
  Image.fromarray(np.stack([mask, mask // 2 + 128], axis=-1)).save(folder / 'clear.png')
  return folder / 'a.png'


def arrays(file):
  with np.load(file) as opened:
    return {name: opened[name] for name in opened.files}


def edit(workdir, image, out, *options):
  assert main(['edit', f'--workdir={workdir}', f'--image={image}', *options, f'--out={out}']) == 0
  return arrays(out)


def redrawn(workdir, file, *options):
  """((4, 4) cells of the last scale, the 1x1 token): whether some of 16 wild versions differ from the file."""
  model = var_jax.load(workdir)
  given = model.encode(fit(read_image(file), (8, 8), enlarge=1)[None])[0]
  out = edit(workdir, file, file.with_suffix('.npz'), '--num=16', '--temperature=9', *options)
  assert out['arr_0'].shape == (16, 8, 8, 3) and out['tokens'].shape == (16, 21)
  assert out['labels'].tolist() == [10] * 16  # no class
  changed = (out['tokens'] != given).any(axis=0)
  return changed[model.tokenizer.pyramid.slices[-1]].reshape(4, 4), changed[0]


def test_tokens_outside_of_the_part_stay_and_those_inside_do_not(workdirs, image):
  """By the cells that the box touches: 8 px, a latent of 4x4, a box over cell (1, 1)."""
  cell = np.zeros((4, 4), bool)
  cell[1, 1] = True
  for box, mode, wanted in (('2,2,4,4', 'inpaint', cell), ('2,2,4,4', 'outpaint', ~cell), ('3,2,4,3', 'inpaint', cell)):
    cells, coarsest = redrawn(workdirs[1], image, f'--box={box}', f'--mode={mode}')
    np.testing.assert_array_equal(cells, wanted)
    assert not coarsest


@pytest.mark.slow
def test_mask_and_box_say_the_same_and_label_and_seed_matter(workdirs, image, tmp_path):
  common = ['--mode=outpaint', '--label=3', '--top_p=0']
  box = edit(workdirs[1], image, tmp_path / 'x.npz', '--box=2,2,4,4', *common)
  mask = edit(workdirs[1], image, tmp_path / 'x.npz', f'--mask={image.parent / "mask.png"}', *common)
  np.testing.assert_array_equal(box['tokens'], mask['tokens'])
  assert box['labels'].tolist() == [3]
  for other in (['--label=4', '--temperature=0.5'], ['--seed=1']):
    again = edit(workdirs[1], image, tmp_path / 'x.npz', '--box=2,2,4,4', *common, *other)
    assert not np.array_equal(again['tokens'], box['tokens']), other


def test_picture_shows_the_original_the_box_and_the_results(workdirs, image, tmp_path):
  options = ['edit', f'--workdir={workdirs[1]}', f'--image={image}', '--box=0,0,4,8', '--num=2']
  for out in ('x.npz', 'x.png'):
    assert main([*options, f'--out={tmp_path / out}']) == 0
  original, zoom = read_image(image), 8  # small images are enlarged
  shown = np.asarray(Image.open(tmp_path / 'x.png'))
  tiles = [shown[2:-2, 68 * i + 2:68 * i + 66][::zoom, ::zoom] for i in range(4)]
  boxed = original.copy()
  boxed[:4] = np.where(np.pad(np.ones((2, 6, 1), bool), ((1, 1), (1, 1), (0, 0))), original[:4], (255, 0, 0))
  for tile, wanted in zip(tiles, (original, boxed, *arrays(tmp_path / 'x.npz')['arr_0'])):
    np.testing.assert_array_equal(tile, wanted)


def test_pasted_pixels_are_those_of_the_original(workdirs, image, tmp_path):
  plain = edit(workdirs[1], image, tmp_path / 'x.npz', '--box=0,0,4,8')
  pasted = edit(workdirs[1], image, tmp_path / 'x.npz', '--box=0,0,4,8', '--paste')
  np.testing.assert_array_equal(pasted['arr_0'][0, 4:], read_image(image)[4:])
  np.testing.assert_array_equal(pasted['arr_0'][0, :4], plain['arr_0'][0, :4])
  np.testing.assert_array_equal(pasted['tokens'], plain['tokens'])


def test_box_is_in_the_files_pixels(workdirs, image):
  """In a file of 16x24 pixels, of which the model sees the centre at half the size."""
  file = image.with_name('large.png')
  Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)).save(file)
  cells, _ = redrawn(workdirs[1], file, '--box=8,0,16,12')
  assert np.argwhere(cells).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


@pytest.mark.parametrize('options, word', [
    ([], '--box'), (['--box=2,2,4,4', '--mask=m.png'], 'either'), (['--box=2,2,4'], 'four'),
    (['--box=4,2,2,4'], '8x8'), (['--box=0,0,9,8'], '8x8'), (['--box=0,0,8,8'], 'keep'), (['--box=a,b,c,d'], 'a,b,c,d'),
    (['--mask=FOLDER/small.png'], '7x8'), (['--mask=FOLDER/clear.png'], 'transparent'),
    (['--box=2,2,4,4', '--out=FOLDER/a.png'], 'replace'), (['--box=2,2,4,4', '--out=FOLDER'], 'replace'),
    (['--mask=FOLDER/mask.png', '--out=FOLDER/mask.png'], 'replace'),
    (['--mask=FOLDER/black.png'], 'draw anew'), (['--mask=none.png'], 'none.png'),
    (['--box=2,2,4,4', '--label=10'], 'label 10'), (['--box=2,2,4,4', '--mode=erase'], 'erase'),
    (['--box=2,2,4,4', '--num=0'], '--num')])
def test_edit_refuses_what_does_not_fit(workdirs, image, tmp_path, capsys, options, word):
  options = [option.replace('FOLDER', str(image.parent)) for option in options]
  out = [] if any(option.startswith('--out') for option in options) else [f'--out={tmp_path / "x.png"}']
  assert main(['edit', f'--workdir={workdirs[1]}', f'--image={image}', *out, *options]) == 2
  error = capsys.readouterr().err.strip()
  assert word in error and '\n' not in error and not (tmp_path / 'x.png').exists()


def test_edit_needs_a_generator(workdirs, image, tmp_path, capsys):
  assert main(['edit', f'--workdir={workdirs[0]}', f'--image={image}', '--box=2,2,4,4', f'--out={tmp_path / "x"}']) == 2
  assert 'tokenizer only' in capsys.readouterr().err


def test_redraw_mask_of_another_shape_is_refused(workdirs):
  model = var_jax.load(workdirs[1])
  images = np.zeros((2, 8, 8, 3), np.uint8)
  for redraw, labels in ((np.zeros((2, 4, 4), bool), None), (np.zeros((2, 8, 8)), None),
                         (np.zeros((2, 8, 8), bool), [1])):
    with pytest.raises(UserError):
      model.edit(images, redraw, labels)


# --- reconstruct: folders and tokens ---------------------------------------------------------------------------------


def test_folder_there_and_back_through_tokens(workdirs, tmp_path):
  source, rng = tmp_path / 'source', np.random.default_rng(0)
  for name in ('b/2.png', 'a/1.jpg', 'a/2.png', 'top.webp'):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(source / name)
  (source / 'notes.txt').write_text('no image')
  command = ['reconstruct', f'--workdir={workdirs[0]}']
  assert main([*command, f'--images={source}', f'--out={tmp_path / "out"}']) == 0
  names = ['1', '2_000001', '2_000002', 'top']
  assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == sorted([*(f'{n}.png' for n in names),
                                                                               'tokens.npz'])
  kept = arrays(tmp_path / 'out/tokens.npz')
  assert kept['tokens'].shape == (4, 21) and kept['names'].tolist() == names
  drawn = np.stack([np.asarray(Image.open(tmp_path / f'out/{name}.png')) for name in names])
  np.testing.assert_array_equal(drawn, var_jax.load(workdirs[0]).decode(kept['tokens']))
  assert main([*command, f'--tokens={tmp_path / "out/tokens.npz"}', f'--out={tmp_path / "again.npz"}']) == 0
  again = arrays(tmp_path / 'again.npz')
  assert np.abs(again['arr_0'].astype(int) - drawn).max() <= 1 and again['scales'].shape == (4, 3, 8, 8, 3)
  assert main([*command, f'--tokens={tmp_path / "out/tokens.npz"}', f'--out={tmp_path / "again"}']) == 0
  assert len(list((tmp_path / 'again').glob('*.png'))) == 4


def test_reconstruct_refuses_what_holds_no_images_or_tokens(workdirs, tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  np.savez(tmp_path / 'x.npz', arr_0=np.zeros(3))
  np.savez(tmp_path / 'short.npz', tokens=np.zeros((2, 20), np.int32))
  for option, name, word in (('images', 'empty', 'no images'), ('tokens', 'x.npz', 'no tokens'),
                             ('tokens', 'short.npz', '21'), ('tokens', 'no.npz', 'no.npz')):
    assert main(['reconstruct', f'--workdir={workdirs[0]}', f'--{option}={tmp_path / name}',
                 f'--out={tmp_path / "o.npz"}']) == 2
    assert word in capsys.readouterr().err
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'empty/a.png')
  for out in ('empty', 'empty/a.png'):
    assert main(['reconstruct', f'--workdir={workdirs[0]}', f'--images={tmp_path / "empty"}',
                 f'--out={tmp_path / out}']) == 2
    assert 'would replace' in capsys.readouterr().err
  np.savez(tmp_path / 'good.npz', tokens=np.zeros((2, 21), np.int32))
  assert main(['reconstruct', f'--workdir={workdirs[0]}', f'--tokens={tmp_path / "good.npz"}',
               f'--out={tmp_path / "good.npz"}']) == 2
  assert 'would replace' in capsys.readouterr().err
  assert main(['reconstruct', f'--workdir={workdirs[0]}', '--held_out=99999', f'--out={tmp_path / "o.png"}']) == 2
  assert 'too many for one picture' in capsys.readouterr().err


@pytest.mark.slow
def test_images_that_are_not_square_are_edited_as_well():
  """8x16 pixels, a latent of 2x4: only the cells of the box change."""
  pyramid = Pyramid.of((1, (1, 2), (2, 4)))
  tokenizer = Tokenizer(pyramid, codes=32, channels=8, ch=8, ch_mult=(1, 1, 2), res_blocks=1)
  generator = Generator(pyramid, 32, 8, classes=3, depth=2, width=16, heads=2)
  params = tokenizer.init(jax.random.key(0), jnp.zeros((1, 8, 16, 3)))['params']
  drawing = generator.init(jax.random.key(1), jnp.zeros(1, int), jnp.zeros((1, pyramid.length - 1, 8)))['params']
  model = Model(tokenizer, params, generator, drawing)
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 16, 3), np.uint8)
  redraw = np.zeros((8, 8, 16), bool)
  redraw[:, 4:, 12:] = True  # the last cell
  edited = model.edit(images, redraw, np.arange(8) % 3, temperature=9.0, top_p=0)
  changed = (edited.tokens != model.encode(images)).any(axis=0)[pyramid.slices[-1]].reshape(2, 4)
  assert edited.images.shape == images.shape and np.argwhere(changed).tolist() == [[1, 3]]
