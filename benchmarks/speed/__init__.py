"""How fast, and in how much memory; the plain recipe that pretraining is held against."""
