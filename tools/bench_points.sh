#!/usr/bin/env bash
# Distinct and stable operating points of recipes/fine-dial.yaml on the bundled model, and the budgets of both phases.
#
#     bash tools/bench_points.sh ../shared/data [TOKENS]
#
# The second checkpoint is another seed, which reads another part of the calibration text.
# TOKENS (16,384, what the recipe's points are chosen for) of each text. Writes docs/results/fine-dial/; half an hour on 2 cores.
set -euo pipefail
data=$1
tokens=${2:-16384}
prism="$(dirname "$0")/../.venv/bin/moe-prism"
texts=(--text "$data/gutenberg/valid.txt.xz" --second-text "$data/wikitext2/test.txt" --tokens "$tokens")
work=build/points
mkdir -p "$work"

for seed in 0 1; do
  out=$work/seed-$seed
  if [ ! -f "$out/SHA256SUMS" ]; then
    "$prism" refactor models/reference "$out" --recipe recipes/fine-dial.yaml --seed "$seed" \
      --text "$data/gutenberg/train.txt.xz"
  fi
done
"$prism" sweep "$work/seed-0" --second "$work/seed-1" --reference models/reference "${texts[@]}" --phases 8,16,32,64 \
  --report docs/results/fine-dial
