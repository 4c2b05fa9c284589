"""Supervised training: pre-training and every fine-tuning on written responses."""
