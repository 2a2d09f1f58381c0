"""Whole tables from one checkpoint, and how fast."""
