"""Protocols on frozen features; `probe.py` puts the nouns together."""
