"""How fast pretraining is, beside the reference recipe."""
