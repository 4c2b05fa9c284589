"""The run folder, where command line and jobs meet: files, records, checkpoints, locks, heartbeats."""
