"""Demo and scenarios on a real cluster."""
