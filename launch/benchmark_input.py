"""How fast the input pipeline delivers JPEGs, beside Pillow alone: rows of benchmark.py, which calls this.

By itself, how well threads hide the time that storage takes for an image, and the memory that this needs:
python launch/benchmark_input.py --sleep=8 --threads=32
"""

if __name__ == '__main__':
  import environment  # noqa: F401, finds var_jax

import argparse
import contextlib
import multiprocessing
import multiprocessing.pool
import os
import pathlib
import resource
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


class Sleeping:
  """A source of as many images as ImageNet that sleeps for some seconds before each, and decodes nothing."""
  class_names = ('one',)

  def __init__(self, seconds, count=1_281_167):
    self.seconds, self.total = seconds, count

  def __len__(self):
    return self.total

  def __getitem__(self, index):
    time.sleep(self.seconds)
    return np.full((*SIZE, 3), index % 256, np.uint8), 0


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sleep', type=float, default=8, metavar='MS', help='of each image, milliseconds (default 8)')
  parser.add_argument('--threads', type=int, default=32, metavar='N', help='see data.threads (default 32)')
  parser.add_argument('--batch_size', type=int, default=768, metavar='N', help='default 768, of 256 px')
  parser.add_argument('--repeats', type=int, default=5, metavar='N', help='stretches that are timed (default 5)')
  parser.add_argument('--batches', type=int, default=10, metavar='N', help='batches of a stretch (default 10)')
  options = parser.parse_args()
  ideal = options.threads / options.sleep * 1000
  made = train_batches(Sleeping(options.sleep / 1000), batch_size=options.batch_size, size=SIZE, seed=0, enlarge=1,
                       threads=options.threads)
  with contextlib.closing(made):
    drop(made, 3)  # what was made ahead is used up
    for _ in range(options.repeats):
      rate = options.batches * options.batch_size / timed(lambda: drop(made, options.batches))
      print(f'{rate:.0f} images/s, {rate / ideal:.0%} of the {ideal:.0f} that {options.threads} threads can sleep')
  print(f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB')


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


if __name__ == '__main__':
  main()
