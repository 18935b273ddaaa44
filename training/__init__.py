"""What surrounds a training step: ranks, signals, checkpoints, logs, stability. It knows names, numbers and tensors."""
