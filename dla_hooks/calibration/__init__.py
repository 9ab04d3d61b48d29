"""What is measured of a model once, by short runs on made-up tokens and activations."""
