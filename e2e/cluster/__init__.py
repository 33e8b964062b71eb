"""Local one-node Kubernetes."""
