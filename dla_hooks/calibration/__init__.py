"""Measurements made once per model, by short runs on synthetic tokens and activations."""
