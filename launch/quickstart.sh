#!/usr/bin/env bash
# Digits that a VAR model drew, from nothing: installs var_jax into .venv, trains both stages on scikit-learn's digits,
# draws samples and judges them. Two cores and some minutes; needs Python 3.11 or newer. Run it again to go on where it
# was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

var_jax() { .venv/bin/python -m var_jax "$@"; }
begun=0 minutes=''
took() { # took WHAT: keeps how long it took since the last call
  minutes+="${minutes:+, }$1 $((SECONDS - begun)) s" begun=$SECONDS
}

install_var_jax .
took 'installing'
echo '1/4 the tokenizer: image -> pyramid of token maps'
var_jax train --config=experiments/digits.py:tokenizer --workdir=runs/digits/tokenizer
took 'tokenizer'
echo '2/4 the generator: token maps -> the next token map'
var_jax train --config=experiments/digits.py:generator --workdir=runs/digits/generator \
  --config.tokenizer=runs/digits/tokenizer
took 'generator'
echo '3/4 pictures, and beside them the tokenizer on held-out digits'
{
  var_jax reconstruct --workdir=runs/digits/generator --held_out=4 --out=runs/digits/scales.png
  var_jax evaluate --workdir=runs/digits/tokenizer --features=classifier --out=runs/digits/tokenizer.json
} > runs/digits/tokenizer.log 2>&1 &
trap 'kill $! 2>/dev/null || true' EXIT
var_jax sample --workdir=runs/digits/generator --labels=0,1,2,3,4,5,6,7,8,9 --num=80 --out=runs/digits/samples.png
echo '4/4 judged by a classifier that was trained on the real digits and is no part of the models'
var_jax evaluate --workdir=runs/digits/generator --features=classifier --out=runs/digits/generator.json
status=0
wait $! || status=$?
trap - EXIT
cat runs/digits/tokenizer.log
[ "$status" = 0 ] || exit "$status"
took 'pictures and judging'
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s ($minutes)"
echo 'look at runs/digits/samples.png and runs/digits/scales.png; to go on: source .venv/bin/activate, then var-jax --help'
