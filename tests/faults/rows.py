"""Bad rows in data files: named by file and line; refused, or set aside with the reason, as configured."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from faults.outcome import Outcome
from r1pipe.config import DataConfig, SourceConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import DataError
from r1pipe.core.paths import SET_ASIDE
from r1pipe.data.files import Files

ROWS = 40
GOOD = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(ROWS)]
BAD_LINES = {
    "not JSON": b'{"question": "What?", "answer": ',
    "missing field": b'{"question": "What?"}',
    "wrong type": b'{"question": ["What?"], "answer": {"a": 1}}',
    "empty": b'{"question": "", "answer": "1"}',
    "a megabyte long": b'{"question": "' + b"x" * (1 << 20) + b'", "answer": "1"}',
    "not UTF-8": b'{"question": "\xe9\xff", "answer": "1"}',
    "no object": b"[1, 2]",
    "half a character": b'{"question": "\\ud800?", "answer": "1"}',
    "nested deeply": b'{"question": ' + b"[" * 9000 + b"]" * 9000 + b', "answer": "1"}',
    "a number too long": b'{"question": "What?", "answer": ' + b"1" * 9000 + b"}",
}


@cache
def shipped() -> DataConfig:
    return compose(["stage=grpo", "data=gsm8k"]).config.data


def config(path: Path, how: str) -> DataConfig:
    """Of a file of problems with the columns question and answer."""
    source = SourceConfig(
        path.name, "en", "sums", {"question": "question", "answer": "answer"}, split="train"
    )
    return replace(shipped(), path=str(path.parent), reasoning=[source], bad_rows=how, max_bad_rows=0.2)


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    draw, times = random.Random(seed), 1 if short else 20
    for name, bad in BAD_LINES.items():
        problems = [once(folder, draw, bad) for _ in range(times)]
        lost = [problem for problem in problems if problem]
        told = lost[0] if lost else "refused by file and line; set aside with its reason and counted"
        yield Outcome(f"bad row: {name}", times, times - len(lost), told)


def once(folder: Path, draw: random.Random, bad: bytes) -> str | None:
    """One to four bad lines among forty good ones; None where they are told and nothing else is lost."""
    path, numbers = folder / "rows.jsonl", sorted(draw.sample(range(1, ROWS), draw.randrange(1, 5)))
    lines = [json.dumps(row).encode() for row in GOOD]
    for number in numbers:
        lines.insert(number - 1, bad)
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        Files(config(path, "refuse")).prompts("train", ROWS, 0)
        return "it was not refused"
    except DataError as error:
        if f"{path} line {numbers[0]}" not in str(error) or "\n" in str(error):
            return f"it was told as: {error}"
    said: list[str] = []
    source = Files(config(path, "set_aside"), folder, said.append)
    found = {prompt.question for prompt in source.prompts("train", 2 * ROWS, 0)}
    if found != {row["question"] for row in GOOD}:
        return f"{len(found)} of {ROWS} good rows were used"
    written = [json.loads(line) for line in (folder / SET_ASIDE).read_text().splitlines()]
    if [row["line"] for row in written] != numbers or not all(row["reason"] for row in written):
        return f"{SET_ASIDE} has {written}"
    if len(said) != 1 or f"{len(numbers)} of {ROWS + len(numbers)} rows" not in said[0]:
        return f"it said {said}"
    return too_many(folder, bad)


def too_many(folder: Path, bad: bytes) -> str | None:
    path = folder / "many.jsonl"
    path.write_bytes(b"\n".join([bad] * 5 + [json.dumps(row).encode() for row in GOOD[:5]]) + b"\n")
    try:
        Files(config(path, "set_aside")).prompts("train", ROWS, 0)
    except DataError as error:
        return None if "more than data.max_bad_rows=0.2" in str(error) else f"it was told as: {error}"
    return "half of the rows were bad, and it went on"
