"""Score base and adapter in the same run, and apply gates to the scores."""
