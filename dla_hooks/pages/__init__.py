"""Results as a page to look at: one html file that needs no network."""
