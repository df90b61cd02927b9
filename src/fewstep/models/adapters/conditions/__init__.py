"""What networks of diffusers are conditioned on: text encoders and images, one part per file."""
