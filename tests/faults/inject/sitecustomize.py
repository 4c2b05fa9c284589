"""Read by every Python process of a command under test, because this folder is on its PYTHONPATH.

FAULT=STAGE/POINT/NTH stops the process at the nth call of a point in that stage: it writes FAULT_MARKER and
stands still, until whoever waits for that file kills all of the command. FAULT_CALLS is a folder where every
process notes the points that it comes by.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from faults.points import JOB, LAUNCHING, POINTS, at, noted, nth_call


def stop(*_):
    Path(os.environ["FAULT_MARKER"]).write_text(f"{os.getpid()}\n")
    while True:
        time.sleep(1.0)


def here(name, stage, arguments):
    """Whether this process is the one that is meant: the stage's rank, or the command that launches it."""
    if name in LAUNCHING:
        texts = [*map(str, arguments)]
        return "RANK" not in os.environ and any(f"/{stage}-s" in t or f"name='{stage}'" in t for t in texts)
    return in_job() == stage and int(os.environ["RANK"]) == POINTS[name].rank % int(os.environ["WORLD_SIZE"])


def in_job():
    """The stage whose rank this is; None in any other process."""
    if "RANK" in os.environ and len(sys.argv) == 2 and sys.argv[0].endswith(".py"):
        return Path(sys.argv[1]).name.partition("-s")[0]
    return None


def stopping(name, stage, nth):
    hook = nth_call(nth, stop)
    return lambda *arguments: here(name, stage, arguments) and hook()


def noting(name, folder):
    """Notes come by in the file of the stage, or in one for all that the command itself does."""

    def hook(*arguments):
        if name in LAUNCHING and "RANK" not in os.environ:
            noted(name, folder / "command.txt")()
        elif name in JOB and (stage := in_job()) and here(name, stage, arguments):
            noted(name, folder / f"{stage}.txt")()

    return hook


def hooks():
    """Module -> what is to be put into it once it is imported."""
    found = defaultdict(list)
    if "FAULT" in os.environ:
        stage, name, nth = os.environ["FAULT"].split("/")
        found[module_of(name)].append((POINTS[name], stopping(name, stage, int(nth))))
    if "FAULT_CALLS" in os.environ:
        for name in POINTS:
            found[module_of(name)].append((POINTS[name], noting(name, Path(os.environ["FAULT_CALLS"]))))
    return found


def module_of(name):
    return POINTS[name].target.partition(":")[0]


class Late(importlib.abc.MetaPathFinder):
    """Puts the hooks in when a process imports the module by itself: most processes never do."""

    def __init__(self, wanted):
        self.wanted = wanted

    def find_spec(self, name, path=None, target=None):
        if name not in self.wanted:
            return None
        points = self.wanted.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for point, hook in points:
                at(point, hook)

        spec.loader.exec_module = exec_module
        return spec


wanted = hooks()
for module in [module for module in wanted if module in sys.modules]:
    for point, hook in wanted.pop(module):
        at(point, hook)
if wanted:
    sys.meta_path.insert(0, Late(wanted))
