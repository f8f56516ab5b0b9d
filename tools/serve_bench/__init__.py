"""Parts of ``tools/bench_serve.py`` that run in a process of their own."""
