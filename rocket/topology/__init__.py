"""Which nodes a cluster has: from a file of DSNs, or from Patroni."""
