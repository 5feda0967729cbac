"""The checker: judges the history of a run, and knows nothing of what ran."""
