"""Reads and writes on a primary and its replicas: pools, the observer and the router."""
