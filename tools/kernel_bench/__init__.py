"""Parts of tools/bench_kernels.py."""
