"""Optimizers on matrix manifolds. Knows tensors and names, not models."""
