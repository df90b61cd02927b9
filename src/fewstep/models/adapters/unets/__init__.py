"""U-Nets of diffusers, one family per file, and what they share."""
