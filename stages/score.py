"""Scores the completions of a file by one rule: what `r1pipe score` runs. No torch, no DeepSpeed here.

    python stages/score.py FILE --reward accuracy      rows {"question", "answer", "completion"}
    python stages/score.py FILE --reward code          rows {"prompt", "tests", "entry_point", "completion"}
    python stages/score.py FILE --reward language --language zh

One JSON object a row: {"status": "scored", "value": 1.0, "detail": ""}; without a verdict the value is null.
All rows are read and checked before the first is scored.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from r1pipe.core.arguments import Arguments
from r1pipe.core.errors import DataError, R1pipeError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import check_gold, score_all

TOGETHER = 64  # rows scored at a time
TASK = "file"  # any name that no rule treats apart
REWARDS = {"accuracy": "accuracy", "code": "accuracy", "format": "format", "language": "language"}
FIELDS = {
    "accuracy": ("question", "answer", "completion"),
    "code": ("prompt", "tests", "entry_point", "completion"),
    "format": ("completion",),
    "language": ("completion",),
}


def main(arguments: argparse.Namespace) -> None:
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    pairs = list(read(Path(arguments.file), arguments.reward, arguments.language))
    name = REWARDS[arguments.reward]
    for first in range(0, len(pairs), TOGETHER):
        prompts, completions = zip(*pairs[first : first + TOGETHER], strict=True)
        for scores in score_all(prompts, completions, [name]):
            show(scores[name])


def show(score: Score) -> None:
    value = score.value if score.status is Status.SCORED else None
    row = {"status": str(score.status), "value": value, "detail": score.detail}
    print(json.dumps(row, ensure_ascii=False), flush=True)


def read(path: Path, reward: str, language: str) -> Iterator[tuple[Prompt, Completion]]:
    """Every row as a prompt and its completion. Raises DataError naming file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL file") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows; write one JSON object a line")
    for number, line in rows:
        try:
            yield pair(parsed(line), f"line {number}", reward, language)
        except DataError as error:
            raise DataError(f"{path} line {number}: {str(error).removeprefix(f'line {number}: ')}") from None


def parsed(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except RecursionError:
        raise DataError("nested too deeply; correct it") from None
    except ValueError as error:  # covers bytes that are not UTF-8 too
        raise DataError(f"not JSON ({error}); correct it") from None
    if not isinstance(row, dict):
        raise DataError("no JSON object; write one a line")
    return row


def pair(row: dict, row_id: str, reward: str, language: str) -> tuple[Prompt, Completion]:
    for name in FIELDS[reward]:
        if row.get(name) is None:
            raise DataError(f"{name} is missing; a row has {', '.join(FIELDS[reward])}")
    if isinstance(row.get("answer"), int | float) and not isinstance(row["answer"], bool):
        row["answer"] = str(row["answer"])
    for name in {*FIELDS[reward]} - {"tests"}:
        if not isinstance(row[name], str):
            raise DataError(f"{name} is no text; write a string")
    checker = {}
    if reward == "code":
        checker = {name: row[name] for name in ("prompt", "tests", "entry_point")}
    question = row.get("question") or row.get("prompt") or ""
    prompt = Prompt(row_id, TASK, language, str(question), row.get("answer", ""), checker)
    if reward in ("accuracy", "code"):
        check_gold(prompt)
    return prompt, Completion([], [], "stop", row["completion"])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Arguments(description="Score the completions of a file by one rule.")
    parser.add_argument("file", help="JSONL, a completion a line")
    parser.add_argument("--reward", required=True, choices=REWARDS, help="which rule")
    parser.add_argument("--language", default="en", choices=("en", "zh"), help="of the questions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except R1pipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the rows has seen enough
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(130)
