"""Image files of every kind, and how they are fitted to a size."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny_images import RED, encoded, noise, png_with_header

from var_jax.data import images
from var_jax.data.floats import floats
from var_jax.data.images import UnreadableImage, fit, read_image, read_mask, to_float, to_uint8
from var_jax.errors import UserError


def test_lossless_files_are_read_pixel_by_pixel(tmp_path):
  rgb = noise(5, 7, 3)
  path = tmp_path / 'a.png'
  path.write_bytes(encoded(rgb))
  for source in (path, str(path), encoded(rgb), encoded(rgb, 'WEBP', lossless=True)):
    image = read_image(source)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)
  smooth = np.full((16, 24, 3), (200, 100, 50), np.uint8)
  np.testing.assert_allclose(read_image(encoded(smooth, 'JPEG', quality=95)), smooth, atol=4)


def test_grey_becomes_three_equal_channels():
  grey = noise(6, 5)
  for data in (encoded(grey), encoded(Image.fromarray(grey).convert('1').convert('L'))):
    image = read_image(data)
    assert image.shape == (6, 5, 3)
    assert (image == image[..., :1]).all()
  np.testing.assert_array_equal(read_image(encoded(grey))[..., 0], grey)
  np.testing.assert_array_equal(read_image(encoded(Image.new('1', (3, 2), 1))), np.full((2, 3, 3), 255))


def test_palettes_show_their_colours_and_transparency_shows_white():
  palette = Image.new('P', (4, 2), 1)
  palette.putpalette([0, 0, 0, *RED, 0, 0, 255])
  palette.putpixel((3, 0), 2)
  image = read_image(encoded(palette))
  assert tuple(image[1, 1]) == RED and tuple(image[0, 3]) == (0, 0, 255)
  image = read_image(encoded(palette, transparency=2))
  assert tuple(image[1, 1]) == RED and tuple(image[0, 3]) == (255, 255, 255)
  image = read_image(encoded(palette, transparency=bytes([255, 0, 255])))
  assert tuple(image[1, 1]) == (255, 255, 255) and tuple(image[0, 3]) == (0, 0, 255)


def test_alpha_is_composited_on_white():
  for mode, colour, wanted in (('RGBA', (200, 0, 0, 51), (244, 204, 204)), ('LA', (0, 0), (255, 255, 255))):
    np.testing.assert_allclose(read_image(encoded(Image.new(mode, (3, 3), colour)))[1, 1], wanted, atol=1)
  assert tuple(read_image(encoded(Image.new('RGB', (2, 2), RED), transparency=RED))[0, 0]) == (255, 255, 255)


def test_cmyk_jpegs_become_rgb():
  cyan = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
  np.testing.assert_allclose(read_image(encoded(cyan, 'JPEG', quality=95))[8, 8], (0, 255, 255), atol=4)
  black = Image.new('CMYK', (16, 16), (0, 0, 0, 255))
  np.testing.assert_allclose(read_image(encoded(black, 'JPEG', quality=95))[8, 8], (0, 0, 0), atol=4)
  # YCCK, as Photoshop writes it: PIL stores the inverse of what it is given, here luma 200, no chroma, no black.
  data = bytearray(encoded(Image.new('CMYK', (16, 16), (55, 127, 127, 0)), 'JPEG', quality=100))
  adobe = data.index(b'Adobe')
  data[adobe + 11] = 2  # the transform of the Adobe marker: the components are YCCK, not CMYK
  np.testing.assert_allclose(read_image(bytes(data))[8, 8], (55, 55, 55), atol=4)


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.array([[0, 257, 25700], [32768, 65278, 65535]], np.uint16)
  data = encoded(values)
  with Image.open(io.BytesIO(data)) as image:
    assert image.mode.startswith('I')
  np.testing.assert_array_equal(read_image(data)[..., 1], [[0, 1, 100], [128, 254, 255]])
  np.testing.assert_array_equal(images._rgb(Image.fromarray(values.astype(np.int32))), read_image(data))


@pytest.mark.parametrize('form', ['BMP', 'GIF', 'TIFF', 'PPM'])
def test_other_formats_are_read_as_png_is(form):
  """Folders of users hold what their tools wrote; a file that is passed over in silence is a class with too little."""
  rgb = noise(9, 7, 3)
  rgb = np.array(Image.fromarray(rgb).quantize(64).convert('RGB')) if form == 'GIF' else rgb
  np.testing.assert_array_equal(read_image(encoded(rgb, form)), rgb)


def test_first_frame_of_several_is_read():
  frames = [Image.new('RGB', (6, 4), colour) for colour in (RED, (0, 0, 255))]
  for form, options in (('GIF', {}), ('TIFF', {}), ('WEBP', {'lossless': True}), ('PNG', {})):
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert read_image(data).shape == (4, 6, 3) and tuple(read_image(data)[1, 1]) == RED, form


def test_transparent_places_of_a_gif_are_white_and_a_tiff_is_turned_once():
  palette = Image.new('P', (4, 2), 1)
  palette.putpalette([0, 0, 0, *RED])
  palette.putpixel((3, 0), 0)
  image = read_image(encoded(palette, 'GIF', transparency=0))
  assert tuple(image[1, 1]) == RED and tuple(image[0, 3]) == (255, 255, 255)
  rgb = noise(4, 6, 3)
  turned = encoded(Image.fromarray(rgb), 'TIFF', tiffinfo={images.ORIENTATION: 6})
  np.testing.assert_array_equal(read_image(turned), np.rot90(rgb, -1))


def test_floats_and_wide_numbers_are_scaled_by_what_they_can_be():
  grey = noise(6, 5)
  grey[0, :2] = 0, 255
  wanted = np.repeat(grey[..., None], 3, -1)
  for values in (grey / np.float32(255), grey.astype(np.float32), grey.astype(np.int32), grey.astype(np.int32) * 257,
                 grey.astype(np.uint16) * 257):
    np.testing.assert_array_equal(read_image(encoded(values, 'TIFF')), wanted)
  dark = read_image(encoded(np.full((4, 4), 200, np.uint16)))  # of 65,535
  assert dark.max() == 1
  for values in (np.full((4, 4), -1, np.float32), np.full((4, 4), 1e6, np.float32), np.full((4, 4), 1 << 20, np.int32),
                 np.full((4, 4), np.nan, np.float32)):
    with pytest.raises(UnreadableImage, match='store 8 bits'):
      read_image(encoded(values, 'TIFF'))


def test_large_profiles_and_texts_of_a_png_spoil_no_pixel():
  """PIL refuses a megabyte of either, after decompression; cameras and editors write more."""
  rgb, text = noise(8, 6, 3), PngImagePlugin.PngInfo()
  text.add_text('notes', 'x' * 3_000_000, zip=True)
  text.add_itxt('more', 'y' * 3_000_000, zip=True)
  exif = Image.Exif()
  exif[images.ORIENTATION] = 6
  for options in (dict(icc_profile=bytes(3_000_000)), dict(pnginfo=text)):
    np.testing.assert_array_equal(read_image(encoded(rgb, **options)), rgb)
    np.testing.assert_array_equal(read_image(encoded(rgb, exif=exif, **options)), np.rot90(rgb, -1))
  assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20  # a switch of the whole process stays as it was


def test_masks_are_read_however_black_and_white_are_stored():
  wanted = noise(6, 5) > 127
  palette = Image.fromarray(np.uint8(wanted), 'P')
  palette.putpalette([0, 0, 0, 128, 0, 0])
  stored = {'0 and 255': np.uint8(wanted * 255), '0 and 1': np.uint8(wanted), 'bits': Image.fromarray(wanted),
            'colours': np.repeat(np.uint8(wanted * 255)[..., None], 3, -1), 'wide': wanted.astype(np.int32),
            '16 bits': wanted.astype(np.uint16), 'floats': wanted.astype(np.float32), 'palette': palette,
            'soft': np.where(wanted, 200, 90 * (noise(6, 5, seed=1) > 127)).astype(np.uint8)}
  for name, mask in stored.items():
    np.testing.assert_array_equal(read_mask(encoded(mask, 'TIFF')), wanted, name)
  for value, answer in ((0, False), (1, True), (255, True)):
    assert (read_mask(encoded(np.full((3, 3), value, np.uint8))) == answer).all()


@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_orientation_is_applied_and_draft_keeps_it(turn):
  upright = np.zeros((32, 64, 3), np.uint8)
  upright[:16, :32] = RED  # top left
  ways = Image.Transpose
  stored = Image.fromarray(upright)
  if turn > 1:
    stored = stored.transpose({2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE,
                               6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270}[turn])
  exif = Image.Exif()
  exif[images.ORIENTATION] = turn
  data = encoded(stored, 'JPEG', quality=95, subsampling=0, exif=exif)
  np.testing.assert_allclose(read_image(data), upright, atol=8)
  half = read_image(data, size=(16, 30))
  assert half.shape == (16, 32, 3)
  np.testing.assert_allclose(half, upright[::2, ::2], atol=8)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_spoils_no_pixel():
  rgb = noise(8, 8, 3)
  for exif in (b'Exif\0\0broken', b'Exif\0\0II*\0\xff\xff\xff\xff'):
    np.testing.assert_array_equal(read_image(encoded(rgb, exif=exif)), rgb)


def test_broken_files_say_which_and_why(tmp_path):
  whole = {form: encoded(noise(64, 64, 3), form) for form in ('JPEG', 'PNG', 'WEBP')}
  cases = {f'torn_{form}': data[:len(data) // 2] for form, data in whole.items()}
  cases |= {'empty': b'', 'text': b'hello', 'riff': b'RIFF....WAVEfmt ', 'head': whole['PNG'][:20]}
  for name, data in cases.items():
    path = tmp_path / f'{name}.jpg'
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=f'{name}.jpg: .+; replace'):
      read_image(path)
  for data, why in ((b'hello', '5 bytes: not a JPEG, PNG or WebP'), (b'', 'empty')):
    with pytest.raises(UnreadableImage, match=why):
      read_image(data)
  with pytest.raises(UnreadableImage, match='gone.png: No such file'):
    read_image(tmp_path / 'gone.png')
  assert issubclass(UnreadableImage, UserError)
  assert 'torn' in str(pickle.loads(pickle.dumps(UnreadableImage('torn'))))


@pytest.mark.filterwarnings('error')
def test_size_is_judged_by_the_header_alone(monkeypatch):
  with pytest.raises(UnreadableImage, match='30000x30000 pixels are more'):
    read_image(png_with_header(30000, 30000))
  with pytest.raises(UnreadableImage, match='truncated'):  # below the limit: decoded, without PIL's warning
    read_image(png_with_header(10000, 9500))
  monkeypatch.setattr(images, 'MAX_PIXELS', 63)
  with pytest.raises(UnreadableImage, match='8x8'):
    read_image(encoded(noise(8, 8, 3)))


def test_fit_is_lanczos_to_an_eighth_more_then_a_crop():
  image = noise(50, 80, 3)
  wide = np.asarray(Image.fromarray(image).resize((28, 18), Image.Resampling.LANCZOS))  # 80 * 18 / 50 = 28.8
  np.testing.assert_array_equal(fit(image, (16, 16)), wide[1:17, 6:22])
  for seed in range(20):
    crop = fit(image, (16, 16), rng=np.random.default_rng(seed))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (16, 16, 3)).reshape(-1, 16, 16, 3)
    assert (windows == crop).all((1, 2, 3)).any()
    np.testing.assert_array_equal(crop, fit(image, (16, 16), rng=np.random.default_rng(seed)))
  assert len({fit(image, (16, 16), rng=np.random.default_rng(seed)).tobytes() for seed in range(20)}) > 10


def test_crop_resized_alone_is_that_of_the_whole_image():
  for seed in range(200):
    image, rng = noise(*np.random.default_rng(seed).integers(8, 300, 2), 3), np.random.default_rng(seed)
    h, w = images._covering(image.shape[:2], (72, 54))
    whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS))
    y, x = rng.integers(h - 63), rng.integers(w - 47)
    crop = fit(image, (64, 48), rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(crop, whole[y:y + 64, x:x + 48])


def test_fit_covers_any_shape_and_leaves_exact_ones_alone():
  for shape in ((3, 90), (90, 3), (1, 1), (8, 24), (7, 23)):
    for size in ((8, 24), (24, 8), (16, 16)):
      assert fit(noise(*shape, 3), size).shape == (*size, 3)
  image = noise(16, 32, 3)
  np.testing.assert_array_equal(fit(image, (16, 32), enlarge=1), image)
  resized = np.asarray(Image.fromarray(image).resize((16, 8), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(fit(image, (8, 16), enlarge=1, rng=np.random.default_rng(0)), resized)
  with pytest.raises(UserError, match='enlarge=0.9'):
    fit(image, (8, 8), enlarge=0.9)
  with pytest.raises(UnreadableImage, match='too narrow'):
    fit(np.zeros((1, 10000, 3), np.uint8), (256, 256))


def test_half_of_the_images_are_mirrored():
  image = noise(8, 8, 3)
  seen = [fit(image, (8, 8), enlarge=1, rng=np.random.default_rng(seed), flip=True) for seed in range(200)]
  mirrored = [(one == image[:, ::-1]).all() for one in seen]
  assert all(flipped or (one == image).all() for flipped, one in zip(mirrored, seen))
  assert 70 < sum(mirrored) < 130
  assert (fit(image, (8, 8), enlarge=1, flip=True) == image).all()


@pytest.mark.parametrize('level', [0, 3])
def test_a_compiled_step_makes_the_floats_of_numpy(level):
  values = np.arange(256, dtype=np.uint8)
  compiled = jax.jit(lambda x: floats(x) * 1).lower(values).compile({'xla_backend_optimization_level': level})
  np.testing.assert_array_equal(compiled(values), to_float(values))
  assert floats(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16  # what is no byte stays


def test_bytes_survive_the_way_to_floats_and_back():
  values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
  floats = to_float(values)
  assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
  np.testing.assert_array_equal(to_uint8(floats), values)
  np.testing.assert_array_equal(to_uint8([-3.0, 0.999, 5.0]), [0, 255, 255])
