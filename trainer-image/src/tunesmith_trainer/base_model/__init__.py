"""The base model: files, tokenizer, layers, weights shared out among ranks, logits."""
