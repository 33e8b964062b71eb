"""The base model: files, tokenizer, layers, weights sharded over ranks, logits."""
