"""What tells files from other files, cheaply."""

import concurrent.futures
import hashlib
import os

PIECE = 4096       # bytes
PIECES = 4         # that are read of a longer file
READERS = 16       # threads: the files of a network file system are slow one by one, not together
AT_A_TIME = 4096   # files given to them at once


def digests(paths):
  """Yields for each file 16 bytes that tell its content from others'.

  A file of up to 16 KiB is read whole. Of a longer one, its length and four pieces are: the first, the last and two
  between. Compressed images that differ anywhere differ in these. A file that cannot be read has a digest too.
  """
  with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
    for start in range(0, len(paths), AT_A_TIME):
      yield from readers.map(_digest, paths[start:start + AT_A_TIME])


def _digest(path):
  digest = hashlib.blake2b(digest_size=16)
  try:
    with open(path, 'rb', buffering=0) as file:
      size = os.fstat(file.fileno()).st_size
      digest.update(b'%d ' % size)
      if size <= PIECE * PIECES:
        digest.update(file.read())
      else:
        for i in range(PIECES):
          file.seek((size - PIECE) * i // (PIECES - 1))
          digest.update(file.read(PIECE))
  except OSError:
    digest.update(b'unreadable')
  return digest.digest()
