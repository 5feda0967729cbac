"""The command `bench`: what the guarantee costs, measured against other routings on the same cluster."""
