"""Memory that loading an elastic checkpoint takes, over the model's own bytes.

    python tools/bench_load_memory.py CHECKPOINT --out build/bench/load_memory.json

Samples the anonymous memory of this process (mapped files can be given back, so they do not count) every 2 ms
while the checkpoint is loaded and packed and while one token is computed at half budget. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import time
from pathlib import Path

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import torch

from moe_prism import load_elastic
from moe_prism.checkpoint.atomic import replace_file
from moe_prism.evaluation.environment import machine, versions


def anonymous_bytes() -> int:
    """Private memory that is not a mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this tool needs Linux")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/bench/load_memory.json"))
    args = parser.parse_args()
    peak, done = [anonymous_bytes()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_elastic(args.checkpoint, verify=False)
    loading = peak[0] - before
    loaded = anonymous_bytes() - before
    peak[0] = anonymous_bytes()
    with torch.no_grad():
        model.generate(torch.tensor([[1]]), max_new_tokens=2, do_sample=False, k_active=0.5)
    done.set()
    watcher.join()
    weights = sum({p.data_ptr() or id(p): p.numel() * p.element_size() for p in model.parameters()}.values())
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(model),
        "versions": versions(),
        "model_bytes": weights,
        "peak_while_loading_over_model": round(loading / weights, 3),
        "after_loading_over_model": round(loaded / weights, 3),
        "peak_while_generating_over_model": round((peak[0] - before) / weights, 3),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
