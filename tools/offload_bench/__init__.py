"""Parts of ``tools/bench_offload.py``: the model, the routing, and a process for each engine."""
