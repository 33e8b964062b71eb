"""Report metrics to trackers (TensorBoard, MLflow, Weights & Biases), each by its own library in a separate process.

Training appends each step to a file, the journal, and never waits: a tracker that is slow, hangs or fails does not
affect it. The libraries' threads and exit handlers, and the trackers' keys, are not in the training process.
"""
