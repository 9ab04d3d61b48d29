"""Numbers with labels: how they are shown, exported and stored."""
