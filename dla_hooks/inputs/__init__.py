"""What the caller typed, as numbers: prompts, answers, positions, and the entries they select."""
