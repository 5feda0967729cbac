"""Hunting timing races: a run's history, and the checker that proves or breaks the claim from it alone."""
