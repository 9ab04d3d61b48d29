"""The later verbs: what would be if a part were not there, and where that is."""
