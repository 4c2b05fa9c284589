"""The process in which math-verify compares: a JSON line {"gold", "answer"} in, {"equal", "error"} out.

Run by its path, with its memory limit in bytes as the argument; it imports nothing of r1pipe.
"""

import json
import logging
import resource
import sys


def compare(gold_text: str, answer_text: str) -> dict:
    """An answer that does not parse is wrong; a comparison that breaks down is an error, not a verdict."""
    from math_verify import parse, verify

    texts = (f"\\boxed{{{text}}}" for text in (gold_text, answer_text))
    gold, answer = (parse(text, parsing_timeout=None, fallback_mode="no_fallback") for text in texts)
    try:
        equal = bool(gold and answer) and verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # noqa: BLE001 - sympy raises anything, and all of it means the same here
        return {"equal": False, "error": f"{type(error).__name__}: {error}"[:200]}
    return {"equal": equal, "error": ""}


def serve(memory_limit: int) -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        print(json.dumps(compare(request["gold"], request["answer"])), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
