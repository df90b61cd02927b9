"""Codecs of diffusers: from frames to latents and back."""
