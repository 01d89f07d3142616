#!/usr/bin/env bash
# Digits that a VAR model drew, from nothing: installs var_jax into .venv, trains both stages on scikit-learn's digits,
# draws samples and judges them. Two cores and some minutes; needs Python 3.11 or newer. Run it again to go on where it
# was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

install_var_jax .
var_jax() { .venv/bin/python -m var_jax "$@"; }

echo '1/4 the tokenizer: image -> pyramid of token maps'
var_jax train --config=experiments/digits.py:tokenizer --workdir=runs/digits/tokenizer
echo '2/4 the generator: token maps -> the next token map'
var_jax train --config=experiments/digits.py:generator --workdir=runs/digits/generator \
  --config.tokenizer=runs/digits/tokenizer
echo '3/4 pictures'
var_jax sample --workdir=runs/digits/generator --labels=0,1,2,3,4,5,6,7,8,9 --num=80 --out=runs/digits/samples.png
var_jax reconstruct --workdir=runs/digits/generator --held_out=4 --out=runs/digits/scales.png
echo '4/4 judged by a classifier that was trained on the real digits and is no part of the models'
var_jax evaluate --workdir=runs/digits/tokenizer --features=classifier --out=runs/digits/tokenizer.json
var_jax evaluate --workdir=runs/digits/generator --features=classifier --out=runs/digits/generator.json
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; look at runs/digits/samples.png and runs/digits/scales.png"
