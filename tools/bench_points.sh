#!/usr/bin/env bash
# Distinct and stable operating points of recipes/fine-dial.yaml on the bundled model, and the budgets of both phases.
#
#     bash tools/bench_points.sh ../shared/data [TOKENS]
#
# The second checkpoint is another seed that reads other calibration text: an importance order has no other randomness.
# TOKENS (32,768, what the recipe's points are chosen for) of each text. Writes docs/results/fine-dial/; an hour on 2 cores.
set -euo pipefail
data=$1
tokens=${2:-32768}
prism="$(dirname "$0")/../.venv/bin/moe-prism"
texts=(--text "$data/gutenberg/valid.txt.xz" --second-text "$data/wikitext2/test.txt" --tokens "$tokens")
work=build/points
mkdir -p "$work"

for seed in 0 1; do
  out=$work/seed-$seed
  if [ ! -f "$out/SHA256SUMS" ]; then
    # a megabyte of its own for each seed; the recipe reads the beginning of it
    xz -dc "$data/gutenberg/train.txt.xz" 2>/dev/null | head -c "$(((seed + 1) * 1000000))" | tail -c 1000000 \
      | iconv -c -f utf-8 -t utf-8 > "$work/calibration-$seed.txt"
    "$prism" refactor models/reference "$out" --recipe recipes/fine-dial.yaml --seed "$seed" \
      --text "$work/calibration-$seed.txt"
  fi
done
"$prism" sweep "$work/seed-0" --second "$work/seed-1" --reference models/reference "${texts[@]}" --phases 8,16,32,64 \
  --report docs/results/fine-dial
