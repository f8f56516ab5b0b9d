#!/usr/bin/env bash
# The frontier of README and docs/benchmarks.md: the bundled model on two texts with two calibration seeds.
#
#     bash tools/bench_frontier.sh ../shared/data [TOKENS]
#
# Writes the demo's report (N = 4, the paper's gates beside) to docs/results/n4/, and the operating points of
# twice as many sub-experts (N = 8) to docs/results/n8/. The text of the second is the same; TOKENS (12,288) of each.
set -euo pipefail
data=$1
tokens=${2:-12288}
prism="$(dirname "$0")/../.venv/bin/moe-prism"
calibration=$data/gutenberg/train.txt.xz
texts=(--text "$data/gutenberg/valid.txt.xz" --second-text "$data/wikitext2/test.txt" --tokens "$tokens")
work=build/frontier
rm -rf "$work"
mkdir -p "$work"

"$prism" demo --out "$work/n4" --recipe recipes/reference.yaml --calibration "$calibration" "${texts[@]}"
mkdir -p docs/results/n4
cp "$work"/n4/report/* docs/results/n4/

for seed in 0 1; do
  "$prism" refactor models/reference "$work/n8-$seed" --recipe recipes/reference.yaml \
    --num-sub-experts 8 --seed "$seed" --text "$calibration"
done
"$prism" sweep "$work/n8-0" --second "$work/n8-1" --reference models/reference "${texts[@]}" --report docs/results/n8
