"""`python -m r1pipe` is the command `r1pipe`."""

from r1pipe.cli.commands import main

main()
