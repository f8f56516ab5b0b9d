"""Workloads at stated loads, and side-by-side results of policies as JSON, tables and pictures."""
