"""Training: from pairs to a policy."""
