"""The race inspector: a live page that shows where each read went, and why."""
