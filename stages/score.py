"""Scores the completions of a file by one rule: what `r1pipe score` runs. No torch, no DeepSpeed here.

    python stages/score.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ScoreOptions

Rows are {"question", "answer", "completion"} for accuracy, {"completion"} for format and language; for code
{"prompt", "tests", "entry_point", "completion"}, or a row of a public data set with its completion
(docs/rewards.md). An answer may be a list of alternatives, a completion a list of messages. Prints one JSON
object per row, in the same order: {"status": "scored", "value": 1.0, "detail": ""}; without a verdict the
value is null.
"""

import codecs
import json
import sys
from dataclasses import replace
from pathlib import Path

from r1pipe.config import script_options
from r1pipe.config.script_options import ScoreOptions
from r1pipe.core import terminal
from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Status
from r1pipe.rewards import check_gold, score_all
from r1pipe.rewards.language import check_language, language_of
from r1pipe.rewards.programs import limits
from r1pipe.rewards.programs.tasks import read_task

TOGETHER = 64  # rows scored at a time
LISTED = 20  # refused rows named at the end
REFUSED = "refused"  # the status of a row that cannot be scored
AUTO = "auto"  # the language: that of the question
TASK = "file"  # any name without rules of its own
REWARDS = {"accuracy": "accuracy", "code": "accuracy", "format": "format", "language": "language"}
FIELDS = {
    "accuracy": ("question", "answer", "completion"),
    "code": ("completion",),
    "format": ("completion",),
    "language": ("completion",),
}


def main(options: ScoreOptions) -> int:
    """Print a verdict for each row: 0, or 2 if no row could be scored.

    Raises ConfigError on an unknown language, DataError on a file that cannot be read, or a refused row if
    `strict`.
    """
    if options.language != AUTO:
        check_language(options.language)
    given = {name: getattr(options, name) for name in ("cpu_seconds", "memory_mb", "partial_credit")}
    limits.use(
        replace(limits.published(), **{name: value for name, value in given.items() if value is not None})
    )
    rows = rows_of(options.file)
    refused: dict[int, str] = {}  # line number -> why
    for first in range(0, len(rows), TOGETHER):
        pairs: dict[int, tuple[Prompt, Completion]] = {}
        chunk = rows[first : first + TOGETHER]
        for number, line in chunk:
            try:
                pairs[number] = pair(parsed(line), f"line {number}", options)
            except DataError as error:
                refused[number] = str(error).removeprefix(f"line {number}: ")
                if options.strict:
                    raise DataError(f"{options.file}:{number}: {refused[number]}") from None
        name = REWARDS[options.reward]
        prompts = [prompt for prompt, _ in pairs.values()]
        completions = [completion for _, completion in pairs.values()]
        scores = dict(zip(pairs, score_all(prompts, completions, [name]), strict=True))
        for number, _ in chunk:
            verdict: dict[str, object] = {"status": REFUSED, "value": None, "detail": refused.get(number)}
            if number in scores:
                score = scores[number][name]
                value = score.value if score.status is Status.SCORED else None
                verdict = {"status": str(score.status), "value": value, "detail": score.detail}
            print(json.dumps(verdict, ensure_ascii=False), flush=True)
    list_refused(refused, len(rows), options.file)
    return 2 if len(refused) == len(rows) else 0


def list_refused(refused: dict[int, str], rows: int, file: Path) -> None:
    """Name the first rows that could not be scored, on standard error."""
    if refused:
        terminal.complain(f"{len(refused)} of {rows} rows could not be scored:")
    for number in list(refused)[:LISTED]:
        print(f"  {file}:{number}: {refused[number]}", file=sys.stderr)
    if len(refused) > LISTED:
        print(f"  and {len(refused) - LISTED} more with the status {REFUSED}", file=sys.stderr)


def rows_of(path: Path) -> list[tuple[int, bytes]]:
    """Every non-empty line with its number. Raises DataError."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
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
    answers = row.get("answer", "")
    answers = answers if isinstance(answers, list) and answers else [answers]
    answers = [str(each) if type(each) in (int, float) else each for each in answers]
    row = row | {"answer": answers[0], "completion": content_of(row["completion"])}
    for name in fields:
        if not isinstance(row[name], str):
            raise DataError(f"{name} must be a string")
    if not all(isinstance(each, str) for each in answers):
        raise DataError("answer must be a string, or a list of strings")
    checker = {"alternatives": answers[1:]} if answers[1:] else {}
    if options.reward == "code":
        checker = read_task(row)
    question = str(row.get("question") or row.get("prompt") or "")
    language = language_of(question) if options.language == AUTO else options.language
    prompt = Prompt(row_id, TASK, language, question, row["answer"], checker)
    if options.reward == "accuracy":
        check_gold(prompt)
    return prompt, Completion([], [], "stop", row["completion"])


def content_of(completion: object) -> object:
    """The content of the last message, where a completion is a list of messages."""
    last = completion[-1] if isinstance(completion, list) and completion else None
    return last["content"] if isinstance(last, dict) and "content" in last else completion


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ScoreOptions, sys.argv)))
