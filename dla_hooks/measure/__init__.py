"""One prompt, from a plan and a source to results, and whether the parts add up."""
