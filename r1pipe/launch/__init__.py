"""Starts and watches jobs: the graph of stages, the DeepSpeed command, progress."""
