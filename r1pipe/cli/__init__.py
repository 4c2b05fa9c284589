"""The command line: its commands, and what they print. Imports no torch."""

from r1pipe.cli.commands import main

__all__ = ["main"]
