"""Torture: a cluster under faults and traffic, all of it recorded, and a checker that reads the record."""
