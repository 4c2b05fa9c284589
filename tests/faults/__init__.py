"""Faults made on purpose, and whether a run survives them: `make faults` runs all of them."""
