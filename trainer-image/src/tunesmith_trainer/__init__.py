"""Trains LoRA adapters from a FineTuneJob manifest."""
