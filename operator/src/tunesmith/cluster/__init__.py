"""The only Kubernetes input and output."""
