"""DeepSpeed, in one place."""
