"""The TransformerLens-shaped face of a raw Hugging Face model."""
