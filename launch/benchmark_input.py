"""How fast the input pipeline delivers JPEGs, beside Pillow alone: rows of benchmark.py, which calls this."""

import contextlib
import multiprocessing
import multiprocessing.pool
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from var_jax.data.pipeline import train_batches
from var_jax.data.sources import open_source

SIZE, BATCH = (256, 256), 64
PAUSE = 3  # seconds, in which the pipeline makes all that it makes ahead: 12 batches with two processes
ENLARGED = 288  # of the published recipe, from which the crop is taken


def rates(workers, repeats, count=4096, batches=16):
  """{name: number}: median images/s of the pipeline, and of a pool of as many workers that decodes, resizes and crops.

  workers: processes, or 0 for a thread on each core. Files have 256 px, so many that grain's shuffle finds an index as
  fast as in a real data set (of 1,000 it takes seven times as long). Both are timed in turn and with the same number of
  images, the pool once the pipeline has made its batches ahead and waits, the pipeline once they are used up.
  """
  with tempfile.TemporaryDirectory() as folder:
    files = write_pictures(pathlib.Path(folder) / 'train' / 'one', count)
    made_of = multiprocessing.get_context('spawn').Pool if workers else multiprocessing.pool.ThreadPool
    made = train_batches(open_source('folder', folder), batch_size=BATCH, size=SIZE, seed=0, workers=workers)
    ours, others = [], []
    with made_of(workers or os.cpu_count()) as pool, contextlib.closing(made):
      for _ in range(repeats + 1):  # the first one warms up
        drop(made, batches)
        ours.append(batches * BATCH / timed(lambda: drop(made, batches)))
        time.sleep(PAUSE)
        others.append(batches * BATCH / timed(lambda: list(pool.imap(plain, files[:batches * BATCH], chunksize=16))))
  mine, plainly = statistics.median(ours[1:]), statistics.median(others[1:])
  return {'images_per_second': mine, 'plain_images_per_second': plainly, 'share_of_plain': mine / plainly,
          'seconds': BATCH / mine}


def drop(made, many):
  for _ in range(many):
    next(made)


def timed(function):
  start = time.monotonic()
  function()
  return time.monotonic() - start


def write_pictures(folder, count):
  """Smooth shapes with some noise: files of about 18 kB."""
  folder.mkdir(parents=True)
  rng, files = np.random.default_rng(0), []
  for i in range(count):
    shapes = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    noisy = np.asarray(shapes) + rng.normal(0, 6, (*SIZE, 3))
    files.append(folder / f'{i}.jpg')
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(files[-1], quality=85)
  return files


def plain(file):
  """Makes what a batch has of an image, as bytes, with Pillow alone, and keeps nothing of it."""
  with Image.open(file) as image:
    large = image.convert('RGB').resize((ENLARGED, ENLARGED), Image.Resampling.LANCZOS)
    np.asarray(large.crop((16, 16, 16 + SIZE[1], 16 + SIZE[0])))
