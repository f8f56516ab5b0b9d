"""Elastic checkpoints in an unmodified vLLM: budgets per request on vLLM's own engine.

Importing this package imports neither vLLM nor torch; vLLM finds ``plugin.register`` through the entry point
``vllm.general_plugins``. docs/vllm.md says which hook of vLLM each file uses.
"""
