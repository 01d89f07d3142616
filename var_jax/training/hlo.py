"""What a compiled program does, counted in its text: XLA's own figures count the body of a loop once.

    cost = count(compiled.as_text())     # FLOPs of products, bytes to and from memory, collectives; of one device
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8, 's4': 0.5, 'u4': 0.5, 'token': 0}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
FREE = ('parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'after-all', 'while', 'conditional', 'call',
        'async-start', 'async-done', 'async-update', 'copy-done', 'opt-barrier', 'partition-id', 'iota')
LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
OFF_MAIN = re.compile(r'S\([1-9]\)')  # in a layout: the array lies in a memory of a TPU's core, which saves traffic


class Cost(NamedTuple):
  """flops of matrix products and convolutions; bytes read and written; {kind: bytes that a device sends}."""

  flops: float
  bytes: float
  sent: dict


class _Instruction(NamedTuple):
  name: str
  shapes: list  # of its result: [(type, dimensions)], several for a tuple
  memory: float  # bytes of those that lie in the main memory
  op: str
  rest: str  # operands and attributes


def count(text, kernels=None):
  """`Cost` of a compiled program: loops count as often as they run, of a conditional the dearest branch.

  kernels: {beginning of a custom call's name: FLOPs for each entry of all but the last two axes of its queries, which
  are the first of its operands that are floating}.
  """
  computations, entry = _parsed(text)
  # One that goes on beside other work stands in the fusions of that work as well as where it begins.
  begun = {_channel(i): name for name, inside in computations.items() for i in inside if i.op in COLLECTIVES
           and any('"AsyncCollectiveStart"' in x.rest for x in inside)}

  @functools.cache
  def cost(name):
    flops, moved, sent = 0.0, 0.0, collections.Counter()
    table = {i.name: i for i in computations[name]}
    for i in computations[name]:
      times, inner = _inner(i, computations)
      costs = [cost(c) for c in inner]
      if i.op == 'conditional':
        costs = [max(costs, key=lambda c: (c[0], c[1]))]
      for inner_flops, inner_bytes, inner_sent in costs:
        flops += times * inner_flops
        moved += 0 if i.op == 'fusion' else times * inner_bytes
        sent.update({kind: times * size for kind, size in inner_sent.items()})
      flops += _flops(i, table, kernels or {})
      kind = i.op.removesuffix('-start')
      if kind in COLLECTIVES:
        sent[kind] += _sent(kind, i, table) * (begun.get(_channel(i), name) == name)
      if i.op not in FREE and not i.op.endswith('-done'):
        moved += _moved(i, table, computations)
    return flops, moved, sent

  flops, moved, sent = cost(entry)
  return Cost(flops, moved, dict(sent))


def _channel(i):
  found = re.search(r'channel_id=(\d+)', i.rest)
  return found[1] if found else i.name


def _moved(i, table, computations):
  """Bytes of main memory that an instruction reads and writes; of slices and updates in place, only what they touch."""
  operands = [table[operand] for operand in _operands(i) if operand in table]
  if i.op in ('dynamic-slice', 'slice'):
    return 2 * i.memory
  if i.op == 'dynamic-update-slice':
    return 2 * operands[1].memory
  if i.op in ('copy-start', 'slice-start'):  # whose result names the source once more
    return _bytes(i.shapes[1:2]) * (operands[0].memory > 0) + max(i.memory - operands[0].memory, 0)
  if i.op == 'custom-call' and 'custom_call_target="AllocateBuffer"' in i.rest:
    return 0
  if i.op != 'fusion':
    return i.memory + sum(operand.memory for operand in operands)
  body = _fused(i, computations)
  inside = {x.name: x for x in body}
  updated = sum(_size(x) - _size(inside[_operands(x)[1]]) for x in body if x.op == 'dynamic-update-slice')
  read = sum(_read(x, body, computations) for x in body if x.op == 'parameter' and x.memory)
  return read + max(i.memory - updated, 0)


def _fused(i, computations):
  return computations[re.search(r'calls=%?([\w.\-]+)', i.rest)[1]]


def _read(x, computation, computations):
  """Bytes of x that a fusion's computation needs: a slice, where it uses nothing else; nothing, to update in place."""
  total = 0
  for user in computation:
    for place, operand in enumerate(_operands(user)):
      if operand != x.name:
        continue
      if user.op in ('dynamic-slice', 'slice') and not place:
        total += _size(user)
      elif user.op == 'bitcast':
        total += _read(user, computation, computations)
      elif user.op == 'fusion':
        inner = _fused(user, computations)
        parameter = next(p for p in inner if p.op == 'parameter' and p.rest.startswith(f'{place})'))
        total += _read(parameter, inner, computations)
      elif user.op != 'dynamic-update-slice' or place:
        return _size(x)
  return min(total, _size(x))


def _parsed(text):
  """({computation: [_Instruction]}, the entry's name)."""
  computations, current, entry = {}, None, None
  for line in text.splitlines():
    if current is None and line.endswith('{') and (' -> ' in line or line.startswith('ENTRY')):
      current = re.match(r'(?:ENTRY )?%?([\w.\-]+)', line)[1]
      computations[current] = []
      entry = current if line.startswith('ENTRY') else entry
    elif line.rstrip() == '}':  # `}}, metadata=…` goes on with the instruction of a kernel
      current = None
    elif current is not None and (match := LINE.match(line)):
      name, shape, op, rest = match.groups()
      found = [((kind, tuple(int(d) for d in dims.split(',') if d)), layout)
               for kind, dims, layout in SHAPE.findall(shape)]
      memory = _bytes(shape for shape, layout in found if not OFF_MAIN.search(layout))
      computations[current].append(_Instruction(name, [shape for shape, _ in found], memory, op, rest))
  return computations, entry


def _inner(i, computations):
  """(how often, names of the computations) that an instruction runs; those of a reduction are not counted."""
  if i.op == 'while':
    body, condition = re.search(r'body=%?([\w.\-]+)', i.rest)[1], re.search(r'condition=%?([\w.\-]+)', i.rest)[1]
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
    return (int(known[1]) if known else _trips(computations[condition], computations[body])), [body]
  if i.op == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', i.rest)
    names = branches[1].split(',') if branches else re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', i.rest)
    return 1, [name.strip().lstrip('%') for name in names]
  if i.op in ('fusion', 'call', 'async-start'):
    return 1, re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', i.rest)[:1]
  return 1, []


def _trips(condition, body):
  """How often a loop runs whose condition compares a counter from 0 with a constant; an unrolled one counts in twos."""
  end, names = max(_constants(condition).values(), default=1), {i.name: i for i in condition}
  counters = [re.search(r'index=(\d+)', names[operand].rest) for i in condition if i.op in ('compare', 'fusion')
              for operand in _operands(i) if operand in names and names[operand].op == 'get-tuple-element']
  if not counters:
    return end
  names, numbers = {i.name: i for i in body}, _constants(body)
  counter = names[_operands(body[-1])[int(counters[0][1])]]  # XLA prints the root last
  steps = [numbers[operand] for operand in _operands(counter) if operand in numbers]
  return math.ceil(end / steps[0]) if counter.op == 'add' and steps else end


def _constants(computation):
  """{name: value} of its whole numbers."""
  return {i.name: int(i.rest.split(')')[0]) for i in computation if i.op == 'constant' and i.shapes[0][1] == ()
          and i.rest.split(')')[0].isdecimal()}


def _operands(i):
  depth, end = 1, len(i.rest)
  for end, letter in enumerate(i.rest):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      break
  return re.findall(r'%([\w.\-]+)', i.rest[:end])


def _size(i):
  """Bytes of a result, wherever they lie."""
  return _bytes(i.shapes)


def _bytes(shapes):
  return sum(BYTES.get(kind, 4) * math.prod(dims) for kind, dims in shapes)


def _flops(i, table, kernels):
  if i.op == 'dot':
    lhs = table[_operands(i)[0]].shapes[0][1]
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
    return 2 * math.prod(i.shapes[0][1]) * math.prod(lhs[int(a)] for a in axes.split(',') if a)
  if i.op == 'convolution':
    return _convolution(i, table)
  if i.op == 'custom-call' and (found := [flops for name, flops in kernels.items() if i.name.startswith(name)]):
    shapes = [table[operand].shapes[0] for operand in _operands(i) if operand in table]
    return found[0] * math.prod(next(dims for kind, dims in shapes if kind in ('bf16', 'f32') and len(dims) > 2)[:-2])
  return 0


def _convolution(i, table):
  """2 · outputs · inputs that each sees: padding and the holes of dilation are no work."""
  lhs, rhs = (table[operand].shapes[0][1] for operand in _operands(i)[:2])
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest)
  out = i.shapes[0][1]
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', i.rest) or [None, ''])[1]))
  spatial = sorted(letter for letter in labels[3] if letter.isdigit())
  values = lambda name: [int(v) for v in window[name].split('x')] if name in window else [1] * len(spatial)
  pads = ([tuple(map(int, p.split('_'))) for p in window['pad'].split('x')] if 'pad' in window
          else [(0, 0)] * len(spatial))
  seen = 1
  for k, letter in enumerate(spatial):
    seen *= _pairs(lhs[labels[1].index(letter)], out[labels[3].index(letter)], values('size')[k],
                   values('stride')[k], pads[k][0], values('lhs_dilate')[k], values('rhs_dilate')[k])
  return 2 * out[labels[3].index('b')] * out[labels[3].index('f')] * rhs[labels[2].index('i')] * seen


@functools.cache
def _pairs(inputs, outputs, size, stride, pad, lhs_dilate, rhs_dilate):
  """How many (output, window) positions of one dimension meet an input."""
  at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * rhs_dilate - pad
  return int(np.sum((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < inputs)))


def _sent(kind, i, table):
  """Bytes that a device sends, in a ring: (g-1)/g of the whole, twice for an all-reduce."""
  group = _group(i.rest)
  inputs = sum(_size(table[operand]) for operand in _operands(i) if operand in table)
  if kind == 'collective-permute':
    return inputs
  whole = inputs * group if kind == 'all-gather' else inputs
  return whole * (group - 1) / group * (2 if kind == 'all-reduce' else 1)


def _group(rest):
  """How many devices take part together."""
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
    return int(match[2])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"('[^']*')=(\d+)", match[1]))
    return math.prod(int(sizes[axis.strip()]) for axis in match[2].split(','))
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return match[1].count(',') + 1
  return 1
