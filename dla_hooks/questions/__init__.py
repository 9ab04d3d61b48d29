"""Questions beyond one logit of one run."""
