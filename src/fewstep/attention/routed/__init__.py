"""Patterns that choose what to read from queries and keys."""
