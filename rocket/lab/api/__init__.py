"""The demonstration's HTTP API. It stands on rocket's public names alone."""
