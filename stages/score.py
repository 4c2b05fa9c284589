"""Scores the completions of a file by one rule: what `r1pipe score` runs. No torch, no DeepSpeed here.

    python stages/score.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ScoreOptions

Rows are {"question", "answer", "completion"} for accuracy, {"prompt", "tests", "entry_point", "completion"}
for code, {"completion"} for format and language. Prints one JSON object per row, in the same order:
{"status": "scored", "value": 1.0, "detail": ""}; without a verdict the value is null.
"""

import json
import sys
from pathlib import Path

from r1pipe.config import script_options
from r1pipe.config.script_options import ScoreOptions
from r1pipe.core import terminal
from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Status
from r1pipe.rewards import check_gold, score_all

TOGETHER = 64  # rows scored at a time
LISTED = 20  # invalid rows named at the end
INVALID_ROW = "invalid_row"  # the status of a row that cannot be scored
TASK = "file"  # any name without rules of its own
REWARDS = {"accuracy": "accuracy", "code": "accuracy", "format": "format", "language": "language"}
FIELDS = {
    "accuracy": ("question", "answer", "completion"),
    "code": ("prompt", "tests", "entry_point", "completion"),
    "format": ("completion",),
    "language": ("completion",),
}


def main(options: ScoreOptions) -> int:
    """Print a verdict for each row: 0, or 2 if no row could be scored. Raises DataError."""
    rows = rows_of(options.file)
    name = REWARDS[options.reward]
    invalid: dict[int, str] = {}  # line number -> why
    for first in range(0, len(rows), TOGETHER):
        chunk = rows[first : first + TOGETHER]
        pairs: dict[int, tuple[Prompt, Completion]] = {}
        for number, line in chunk:
            row_id = f"line {number}"
            try:
                pairs[number] = pair(parsed(line), row_id, options)
            except DataError as error:
                invalid[number] = str(error).removeprefix(f"{row_id}: ")
        prompts = [prompt for prompt, _ in pairs.values()]
        completions = [completion for _, completion in pairs.values()]
        scores = dict(zip(pairs, score_all(prompts, completions, [name]), strict=True))
        for number, _ in chunk:
            if number in invalid:
                verdict: dict[str, object] = {"status": INVALID_ROW, "value": None, "detail": invalid[number]}
            else:
                score = scores[number][name]
                value = score.value if score.status is Status.SCORED else None
                verdict = {"status": str(score.status), "value": value, "detail": score.detail}
            print(json.dumps(verdict, ensure_ascii=False), flush=True)
    if invalid:
        terminal.complain(f"{len(invalid)} of {len(rows)} rows could not be scored:")
        for number in list(invalid)[:LISTED]:
            print(f"  {options.file}:{number}: {invalid[number]}", file=sys.stderr)
    if len(invalid) > LISTED:
        print(f"  and {len(invalid) - LISTED} more with the status {INVALID_ROW}", file=sys.stderr)
    return 2 if len(invalid) == len(rows) else 0


def rows_of(path: Path) -> list[tuple[int, bytes]]:
    """Every non-empty line with its number. Raises DataError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL file") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows; write one JSON object a line")
    return rows


def parsed(line: bytes) -> dict:
    """Raises DataError."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise DataError("nested too deeply; correct it") from None
    except ValueError as error:  # covers bytes that are not UTF-8 too
        raise DataError(f"not JSON ({error}); correct it") from None
    if not isinstance(row, dict):
        raise DataError("no JSON object; write one a line")
    return row


def pair(row: dict, row_id: str, options: ScoreOptions) -> tuple[Prompt, Completion]:
    """A row as a prompt and its completion. Raises DataError."""
    fields = FIELDS[options.reward]
    for name in fields:
        if row.get(name) is None:
            raise DataError(f"{name} is missing; a row has {', '.join(fields)}")
    if isinstance(row.get("answer"), int | float) and not isinstance(row["answer"], bool):
        row["answer"] = str(row["answer"])
    for name in {*fields} - {"tests"}:
        if not isinstance(row[name], str):
            raise DataError(f"{name} must be a string")
    checker = {}
    if options.reward == "code":
        checker = {name: row[name] for name in ("prompt", "tests", "entry_point")}
    question = row.get("question") or row.get("prompt") or ""
    prompt = Prompt(row_id, TASK, options.language, str(question), row.get("answer", ""), checker)
    if options.reward in ("accuracy", "code"):
        check_gold(prompt)
    return prompt, Completion([], [], "stop", row["completion"])


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ScoreOptions, sys.argv)))
