"""A processor that others use, too: for tests that no verdict depends on it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def busy_processor(processes: int = 4) -> Iterator[None]:
    """So many processes compete for the one processor that this thread, and what it starts, may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # they end with this process, too
    others = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, allowed)
