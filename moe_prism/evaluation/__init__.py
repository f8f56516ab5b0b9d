"""Quality of a model at every budget: perplexity, KL, operating points, plots, report, lm-eval model.

Knows budgets only as context managers of :mod:`moe_prism.elastic`; nothing of gates, solvers or executors.
"""
