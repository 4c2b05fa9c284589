"""What a run takes, before anything is spent: memory and disk."""
