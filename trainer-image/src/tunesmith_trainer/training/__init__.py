"""Training: a Trainer with its own tokens and batches, monitored at every step."""
