"""What every package may use: errors, paths, redaction, formatting, statistics, and shared types."""
