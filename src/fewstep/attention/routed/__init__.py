"""Patterns that choose what to read by looking at queries and keys."""
