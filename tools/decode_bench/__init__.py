"""Parts of tools/bench_decode.py; some run under the Python of another engine, so nothing is imported here."""
