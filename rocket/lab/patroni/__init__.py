"""Patroni: the topology that it tells by its REST API, and a cluster of its own making on this machine."""
