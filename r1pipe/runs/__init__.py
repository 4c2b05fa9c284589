"""The run folder: files, records, checkpoints, locks, heartbeats and lineage. Both wings meet here."""
