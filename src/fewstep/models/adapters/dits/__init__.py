"""Diffusion transformers of diffusers, one family per file, and what several share."""
