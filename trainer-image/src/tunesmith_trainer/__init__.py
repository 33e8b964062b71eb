"""Train LoRA adapters from a FineTuneJob manifest."""
