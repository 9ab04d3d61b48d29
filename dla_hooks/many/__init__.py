"""The verb over many prompts: batches, stored results, resuming."""
