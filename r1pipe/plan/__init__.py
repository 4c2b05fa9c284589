"""What a run takes, before anything is spent: memory and disk of a run here; time and cost on a cluster."""
