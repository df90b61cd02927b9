"""Causal students that make video chunk by chunk."""
