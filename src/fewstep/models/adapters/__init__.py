"""Models of the diffusers ecosystem: each file is one family over diffusers' own classes, imported when it is asked for."""
