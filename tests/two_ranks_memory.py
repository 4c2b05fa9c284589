"""Launched on some ranks by test_sharded.py: the most memory that a rank takes to load and train a model at
ZeRO level 3, with a reference and a reward model beside it."""
