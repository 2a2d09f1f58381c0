"""Says how good a backbone is: detection, linear classification, kNN."""
