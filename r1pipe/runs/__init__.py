"""The run folder on disk: files, records, checkpoints, locks, heartbeats and lineage. Both wings meet here."""
