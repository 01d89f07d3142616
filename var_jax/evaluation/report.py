"""`report.html`: a run on one page that needs no other file: curves, codebook, pictures, figures, settings."""

import base64
import html
import importlib.metadata
import io
import json
import pathlib
import platform
import re

import jax
import numpy as np
from PIL import Image

from var_jax import pictures
from var_jax.data.sources import open_source
from var_jax.data.spread import spread
from var_jax.evaluation.image_sets import SourceImages
from var_jax.training import metrics, processes

PER_CLASS, MOST_CLASSES, NEIGHBOURS = 8, 20, 5
AT_A_TIME = 16  # images of a data set that are read: they may be photos
MOST_HELD_OUT = 4  # images whose scales are shown
MOST_COMPARED = 60_000  # training images that are searched for neighbours
PACKAGES = ('var_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; height: auto; }} .pixels {{ image-rendering: pixelated; }}
.wide {{ overflow-x: auto; }} p.note {{ color: #555; font-size: .9rem; margin: .3rem 0; }}
table {{ border-collapse: collapse; }} td {{ padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #eee; }}
td + td {{ text-align: right; font-variant-numeric: tabular-nums; }} pre {{ overflow-x: auto; font-size: .8rem; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def write(folder, workdir, model, config, figures, samples=None):
  """Writes `folder/report.html` of the model in a workdir, and gives its path.

  figures: {name: number or text} of the evaluation; samples: (images (N, H, W, 3) uint8, labels (N,)) of a generator.
  """
  workdir = pathlib.Path(workdir)
  path, names = pathlib.Path(folder) / 'report.html', model.class_names
  parts = [('Figures', _table(_said(figures, model.tokenizer.codes))),
           ('Judged as their class', _table(figures.get('by_class', {})))]
  curves = _curves(workdir / 'metrics.jsonl', model.tokenizer.pyramid)
  if curves:
    parts.append(('Training', curves))
  if samples is not None:
    parts.append(('Samples', _samples(*samples, names)))
    tiles, count = neighbours(config, model.tokenizer.image_size, *samples)
    parts.append(('Nearest training images', _image(pictures.grid(tiles), 'samples and neighbours') + _note(
        f'Left the sample, then the training images with the smallest squared pixel difference, of {count}. '
        + _rows(samples[1], names))))
  parts.append(('What every scale adds', _scales(config, model)))
  parts.append(('Codebook', _codebook(figures, workdir / 'metrics.jsonl')))
  parts.append(('Settings', _folded('config.json', json.dumps(json.loads(config.to_json()), indent=2))))
  parts.append(('Environment', _table(_environment())))
  body = '\n'.join(f'<h2>{title}</h2>\n{content}' for title, content in parts if content)
  title = f'var_jax {config.stage}: {"/".join(workdir.absolute().parts[-2:])}'
  if processes.is_first():
    path.write_text(PAGE.format(title=html.escape(title), body=body))
  return path


def _said(figures, codes):
  """The figures that fit into a line, filters that leave all codes being called so."""
  rows = {name: value for name, value in figures.items() if not isinstance(value, dict)}
  if 'top_k' in rows and not 0 < rows['top_k'] < codes:
    rows['top_k'] = 'all'
  if 'top_p' in rows and not 0 < rows['top_p'] < 1:
    rows['top_p'] = 'all'
  return rows


def _rows(labels, names):
  """Which class each row of a picture is of."""
  shown = np.unique(labels)[:MOST_CLASSES]
  said = ', '.join(f'{label} {names[label]}' if names and names[label] != str(label) else str(label) for label in shown)
  return f'A row for each class: {said}.' if len(shown) > 1 else f'Class {said}.'


def _table(rows):
  if not rows:
    return ''
  text = lambda value: f'{value:.4g}' if isinstance(value, float) else str(value)
  cells = (f'<tr><td>{html.escape(name.replace("_", " "))}</td><td>{html.escape(text(value))}</td></tr>'
           for name, value in rows.items())
  return f'<div class="wide"><table>{"".join(cells)}</table></div>'


def _folded(title, text):
  return f'<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>'


def _image(picture_HxWx3, alt, pixels=True):
  buffer = io.BytesIO()
  Image.fromarray(picture_HxWx3).save(buffer, 'PNG')
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img {"class=pixels " if pixels else ""}alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _note(text):
  return f'<p class="note">{html.escape(text)}</p>'


def _figure(draw, width, height):
  """A matplotlib figure as an image; draw: called with it."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
  draw(figure)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _curves(path, pyramid):
  """Curves over the steps: loss and PSNR, in training and held out; then loss, or the codebook's usage, per scale."""
  series = metrics.read(path)
  in_all = {title: [name for name in (f'train/{key}', f'validation/{key}') if name in series]
            for title, key in (('loss', 'loss'), ('PSNR in dB', 'psnr'))}
  per_scale = [name for name in series if name.startswith('validation/loss/scale')]
  per_scale = per_scale or [name for name in series if name.startswith('validation/usage/scale')]
  sizes = [f'{height}x{width}' for height, width in pyramid.scales]
  scale = lambda name: sizes[int(re.search(r'\d+$', name)[0])]
  what = 'loss' if any('/loss/' in name for name in per_scale) else 'share of the codes in use'
  charts = {title: {'training' if name.startswith('train/') else 'held out': series[name] for name in names}
            for title, names in in_all.items()}
  charts[f'{what}, held out, per scale'] = {scale(name): series[name] for name in per_scale}
  return ''.join(_chart(title, lines) for title, lines in charts.items() if lines)


def _chart(title, lines):
  """Lines of {label: [(step, value), ...]}."""

  def draw(figure):
    ax = figure.subplots()
    for label, points in lines.items():
      ax.plot(*zip(*points), marker='.' if len(points) < 30 else None, label=label)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel('step', fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    figure.legend(fontsize=7, loc='outside lower center', ncols=min(len(lines), 5))  # beside the curves

  return _image(_figure(draw, 4.2, 3.2), f'curves over the steps, {title}', pixels=False)


def _samples(images, labels, names):
  """The first samples of each class, a row each."""
  rows = []
  for label in np.unique(labels)[:MOST_CLASSES]:
    found = images[labels == label][:PER_CLASS]
    rows.append(np.concatenate([found, np.full((PER_CLASS - len(found), *images.shape[1:]), 255, np.uint8)]))
  return _image(pictures.grid(np.stack(rows)), 'samples') + _note(_rows(labels, names))


def neighbours(config, size, images, labels):
  """(for each class a sample, then the training images nearest to it: (R, 1+n, H, W, 3); how many were searched)."""
  source = open_source(config.data.source, config.data.path, 'train')
  index = np.linspace(0, len(source) - 1, min(len(source), MOST_COMPARED)).astype(int)
  chosen = np.stack([images[labels == label][0] for label in np.unique(labels)[:MOST_CLASSES]])
  wanted = chosen.reshape(len(chosen), -1).astype(np.float32)
  nearest = np.full((len(chosen), NEIGHBOURS), np.inf), np.zeros((len(chosen), NEIGHBOURS, *chosen.shape[1:]), np.uint8)
  for real in SourceImages(source, size, index, config.data.workers).batches(AT_A_TIME):
    flat = real.reshape(len(real), -1).astype(np.float32)
    distance = (wanted**2).sum(1)[:, None] + (flat**2).sum(1) - 2 * wanted @ flat.T
    distances = np.concatenate([nearest[0], distance], axis=1)
    order = np.argsort(distances, axis=1)[:, :NEIGHBOURS]
    for row, ranks in enumerate(order):
      together = [nearest[1][row][r] if r < NEIGHBOURS else real[r - NEIGHBOURS] for r in ranks]
      nearest[0][row], nearest[1][row] = distances[row, ranks], np.stack(together)
  return np.concatenate([chosen[:, None], nearest[1]], axis=1), len(index)


def _scales(config, model):
  source = open_source(config.data.source, config.data.path, 'validation')
  chosen = SourceImages(source, model.tokenizer.image_size, spread(source, MOST_HELD_OUT))
  images = np.concatenate(list(chosen.batches(AT_A_TIME)))
  tokens = model.encode(images)
  picture = pictures.scales_figure(images, tokens, model.decode_every_scale(tokens), model.tokenizer.pyramid)
  return '<div class="wide">' + _image(picture, 'held-out images after every scale', pixels=False) + '</div>' + _note(
      'Held-out images, their token maps, and the picture decoded from the scales so far.')


def _codebook(figures, path):
  """Bars of the usage per scale, from the figures or from the last evaluation in training."""
  usage = {name.removeprefix('usage_'): value for name, value in figures.items() if name.startswith('usage_')}
  usage = usage or {name.rpartition('/')[2].replace('_', ' '): values[-1][1]
                    for name, values in metrics.read(path).items() if name.startswith('validation/usage/')}
  if not usage:
    return ''

  def draw(figure):
    ax = figure.subplots()
    ax.bar(list(usage), [100 * value for value in usage.values()])
    ax.set_ylabel('% of the codes')
    ax.set_ylim(0, 100)

  return _image(_figure(draw, 6, 2.4), 'codebook usage per scale', pixels=False) + _note(
      'Share of the codes that occur at least once at a scale, on held-out images.')


def _environment():
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  return versions | {'python': platform.python_version(), 'devices': devices}
