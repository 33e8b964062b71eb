"""Metrics for trackers (TensorBoard, MLflow, Weights & Biases), each by its own library in a process of its own.

Training writes each step into a file, the journal, and never waits: a tracker that is slow, hangs or ends is no matter
to it, its library's threads and exit handlers are not in the process that trains, and neither are its keys.
"""
