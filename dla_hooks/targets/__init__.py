"""What is attributed: a linear reading of the stream."""
