"""Makes a backbone: Momentum Contrast v1 and v2."""
