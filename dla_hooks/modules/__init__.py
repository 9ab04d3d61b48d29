"""Tools for any torch module: hooks, weights, linear maps, norms, versions."""
