"""Where a model writes to its residual stream: declarations, and the modules that they name."""
