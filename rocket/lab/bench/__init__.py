"""The benchmark: what the guarantee costs, each routing against the others on one cluster in one run."""
