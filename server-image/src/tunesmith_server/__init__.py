"""The agent of a serving pod, and the middleware that it puts into vLLM."""
