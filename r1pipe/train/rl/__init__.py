"""Reinforcement learning: rollout -> score -> advantages -> update."""
