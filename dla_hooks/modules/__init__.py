"""What any torch module can be asked: hooks, weights, linear maps, norms, versions."""
