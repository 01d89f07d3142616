"""The figures of benchmark.py as a table and as a picture."""

from var_jax.errors import UserError


def table(found, old):
  """Markdown: a row for each program."""
  lines = ['| | images/s | GFLOP/s | of the product | memory | compile |' + (' than before |' if old else ''),
           '|---|---|---|---|---|---|' + ('---|' if old else '')]
  for name, row in found.items():
    if 'gflops' not in row:
      share = (f'{row["share_of_plain"]:.0%} of Pillow\'s' if 'share_of_plain' in row else
               f'{row["share_beyond_step"]:.0%} beyond the step')
      lines.append(f'| {name} | {row["images_per_second"]:.0f} | | {share} | | |'.replace('%', ' %') + ' |' * bool(old))
      continue
    memory = (row['arguments_mib'] + row['temporaries_mib'] + row['output_mib']) / 1024
    line = (f'| {name} | {row["images_per_second"]:.3g} | {row["gflops_per_second"]:.0f} | '
            f'{row["share_of_product"]:.0%} | {memory:.2f} GiB | {row["compile_seconds"]:.0f} s |')
    if old:
      line += f' {old[name]["seconds"] / row["seconds"]:.2f}x |' if name in old else ' |'
    lines.append(line.replace('%', ' %'))
  return '\n'.join(lines)


def plot(found, path, tokens):
  """Seconds of an image against its side, with its tokens, and against the batch. tokens: {side: how many}."""
  from matplotlib.figure import Figure

  by_size = {128: 'sample d16, batch 1, 128 px', 256: 'sample d16, batch 1', 512: 'sample d16, batch 1, 512 px'}
  by_batch = {batch: f'sample d16, batch {batch}' for batch in (1, 4, 16)}
  missing = [name for name in (*by_size.values(), *by_batch.values()) if name not in found]
  if missing:
    raise UserError(f'--plot needs rows that --out does not have: {"; ".join(missing)}')
  seconds = lambda rows: [found[name]['seconds'] for name in rows.values()]
  figure = Figure(figsize=(9, 3.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  left.loglog(list(by_size), seconds(by_size), 'o-')
  for size, took in zip(by_size, seconds(by_size)):
    left.annotate(f'{tokens[size]} tokens, {tokens[size] / took:.0f}/s', (size, took), (4, -12),
                  textcoords='offset points', fontsize=8)
  left.set(xlabel='side of the image, px', ylabel='seconds for one image', xlim=(110, 1100))
  left.set_ylim(min(seconds(by_size)) / 2, max(seconds(by_size)) * 2)
  left.set_xticks(list(by_size), [str(size) for size in by_size])
  left.set_yticks(seconds(by_size), [f'{took:.1f}' for took in seconds(by_size)])
  left.minorticks_off()
  each = [took / batch for batch, took in zip(by_batch, seconds(by_batch))]
  right.plot(list(by_batch), each, 'o-')
  right.set(xlabel='batch', ylabel='seconds an image', ylim=(0, 1.2 * max(each)), xticks=list(by_batch))
  figure.suptitle('d16 with guidance and decoder, ' + found['sample d16, batch 1']['machine'], fontsize=10)
  figure.savefig(path, dpi=110)
