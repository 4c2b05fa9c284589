"""The process that checks answers: a JSON line in, {"right", "error"} out.

{"gold", "answer", "relation"}: formulas.py compares them. {"task", "entry", "answer"}: reasoning-gym's scorer
decides; {"task"} loads the task. An item that takes more than its "cpu_limit_s" of processor time ends the
process by SIGPROF. Run by its path, with its memory limit in bytes as the argument; only the scorers need
anything of r1pipe.
"""

import json
import logging
import re
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

OUT_OF_MEMORY = 12  # exit code, ENOMEM's number: an item took more than half of the limit, and has no verdict


def compare(gold: str, answer: str, relation: str = "") -> dict:
    """Whether two formulas are equal, or two relations, of which `left - right` is given, say the same.

    An answer that does not parse is wrong; a comparison that breaks down is an error, not a verdict.
    """
    from r1pipe.rewards import formulas

    try:
        right = formulas.read(gold)
        given = formulas.read(answer)
        if right is None or given is None:
            return {"right": False, "error": ""}
        return {"right": formulas.equal(right, given, relation), "error": ""}
    except Exception as error:  # noqa: BLE001 - sympy raises anything, and all of it means the same here
        return {"right": False, "error": f"{type(error).__name__}: {error}"[:200]}


def score(request: dict) -> dict:
    """Partial credit is not a right answer; a scorer that breaks down gives no verdict."""
    try:
        from r1pipe.rewards import gym
        from r1pipe.rewards.programs.jailed import decode

        if "entry" not in request:
            gym.dataset(request["task"])
            return {"right": False, "error": ""}
        right = gym.score(request["task"], decode(request["entry"]), request["answer"]) >= 1.0
    except Exception as error:  # noqa: BLE001 - a hundred scorers, and whatever they raise means the same
        return {"right": False, "error": f"{type(error).__name__}: {error}"[:200]}
    return {"right": right, "error": ""}


def peak_memory() -> int:
    """Peak memory of this program in bytes, 0 where unknown; getrusage would include its parent's."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii", "replace")):
            return int(found[1]) * 1024
    return 0


def serve(memory_limit: int) -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    replies, sys.stdout = sys.stdout, sys.stderr  # what a scorer prints is no reply
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request.pop("cpu_limit_s", 0))  # 0: none
        reply = score(request) if "task" in request else compare(**request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # sympy and the scorers take a MemoryError for an answer that means nothing
        if peak_memory() > memory_limit / 2:
            sys.exit(OUT_OF_MEMORY)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
