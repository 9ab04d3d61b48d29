"""The caller's arguments as numbers: prompts, answers, positions, and the entries they select."""
