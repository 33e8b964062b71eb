"""Fine-tuning methods: converted from a manifest to PEFT's configuration, put on a base, checked, and saved."""
