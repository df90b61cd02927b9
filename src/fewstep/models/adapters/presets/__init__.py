"""Presets: other ways to sample a published model than the card's own, one file per source of facts."""
