"""Training, except for the loop in train.py: settings, ranks, signals, checkpoints, logs, stability."""
