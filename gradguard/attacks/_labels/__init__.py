"""Labels from the gradient of the last layer: the head, counts per class, and the baselines."""
