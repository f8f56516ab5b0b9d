"""The parts of tools/bench_vllm.py: a process with one engine, and a server with clients."""
