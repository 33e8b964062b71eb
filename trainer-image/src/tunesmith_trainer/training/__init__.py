"""Training: a Trainer over our own tokens and batches, watched at every step."""
