"""Evaluation: accuracy by depth and by N, streaming agreement, latency, and the report."""
