"""The FCN of MoCo v1's appendix; `training.py` puts the nouns together."""
