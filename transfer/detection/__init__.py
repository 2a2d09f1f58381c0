"""Detectron2 fine-tuning and evaluation; `job.py` puts the nouns together."""
