"""All Kubernetes input and output: `client.Cluster`, `events.EventRecorder`, and the errors of `errors`."""
