"""Fine-tuning methods: what a manifest asks for as PEFT's configuration, put on a base, checked, and saved."""
