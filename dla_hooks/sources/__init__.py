"""Where activations come from: a run of the model, or a stored cache."""
