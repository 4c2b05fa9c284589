"""The jobs: engine, rollouts, reinforcement learning, supervised fine-tuning, evaluation."""
