"""symbolic_worker.py with one answer that takes 200 MB: run by its path in the worker's place."""

import sys

from r1pipe.rewards import symbolic_worker

EATER = "eater"  # the answer
compare = symbolic_worker.compare


def compare_or_eat(gold: str, answer: str, relation: str = "") -> dict:
    if answer == EATER:
        assert b"x" * (200 << 20)
    return compare(gold, answer, relation)


if __name__ == "__main__":
    symbolic_worker.compare = compare_or_eat
    symbolic_worker.serve(int(sys.argv[1]))
