"""Hosts as namespaces of this machine, a Slurm of one node, and what is tried on them: `make hosts`."""
