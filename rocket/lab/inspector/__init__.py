"""The race inspector: a live page where each read's way can be seen, and why it went there."""
