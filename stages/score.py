"""Scores the completions of a file by one reward: what `r1pipe score` runs. No torch, no DeepSpeed here.

    python stages/score.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ScoreOptions

Rows are {"question", "answer", "completion"} for accuracy, {"completion"} for format and language; for code
{"prompt", "tests", "entry_point", "completion"}, or a row of a public data set with its completion
(docs/rewards.md); a custom reward reads {"completion"}, and "question" (or "prompt"), "answer" and "checker"
where there are any. An answer may be a list of alternatives, a completion a list of messages. Prints one JSON
object per row, in the same order: {"status": "scored", "value": 1.0, "detail": ""}; without a verdict the
value is null.
"""

import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from r1pipe.config import RewardsConfig, script_options
from r1pipe.config.custom_rewards import installed
from r1pipe.config.fields import build
from r1pipe.config.groups import read
from r1pipe.config.rl import RULE_REWARDS
from r1pipe.config.script_options import ScoreOptions
from r1pipe.core import terminal
from r1pipe.core.errors import ConfigError, DataError, nearest
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import check_gold, score_all
from r1pipe.rewards.custom import CustomRewards
from r1pipe.rewards.language import check_language, language_of
from r1pipe.rewards.programs import limits
from r1pipe.rewards.programs.tasks import read_task

TOGETHER = 64  # rows scored at a time
LISTED = 20  # refused rows named at the end
REFUSED = "refused"  # the status of a row that cannot be scored
AUTO = "auto"  # the language: that of the question
TASK = "file"  # any name without rules of its own
REWARDS = {"accuracy": "accuracy", "code": "accuracy", "format": "format", "language": "language"}
OPTIONS = {  # how a key of the config is given here
    "stage.rewards.weights.": "--reward ",
    "stage.rewards.weights": "--reward",
    "stage.rewards.plugins:": "--plugin",
}
FIELDS = {
    "accuracy": ("question", "answer", "completion"),
    "code": ("completion",),
    "format": ("completion",),
    "language": ("completion",),
}


def main(options: ScoreOptions) -> int:
    """Print a verdict for each row: 0, or 2 if no row could be scored.

    Raises ConfigError on an unknown language or reward, DataError on a file that cannot be read, or a refused
    row if `strict`.
    """
    if options.language != AUTO:
        check_language(options.language)
    custom = custom_reward(options) if options.plugins or options.reward not in REWARDS else None
    limits.use(replace(limits.published(), **limits_given(options)))
    rows = rows_of(options.file)
    refused: dict[int, str] = {}  # line number -> why
    together = len(rows) if custom else TOGETHER  # a group must not be cut
    for first in range(0, len(rows), together):
        pairs: dict[int, tuple[Prompt, Completion]] = {}
        chunk = rows[first : first + together]
        for number, line in chunk:
            try:
                pairs[number] = pair(parsed(line), f"line {number}", options)
            except DataError as error:
                refused[number] = str(error).removeprefix(f"line {number}: ")
                if options.strict:
                    raise DataError(f"{options.file}:{number}: {refused[number]}") from None
        scored = scores_of([*pairs.values()], options.reward, custom)
        scores = dict(zip(pairs, scored, strict=True))
        for number, _ in chunk:
            verdict: dict[str, object] = {"status": REFUSED, "value": None, "detail": refused.get(number)}
            if number in scores:
                score = scores[number] or Score(0.0, detail="the reward has no rule for this prompt")
                valid = scores[number] and score.status is Status.SCORED
                verdict = {"status": str(score.status), "value": score.value if valid else None}
                verdict["detail"] = score.detail
            print(json.dumps(verdict, ensure_ascii=False), flush=True)
    list_refused(refused, len(rows), options.file)
    return 2 if len(refused) == len(rows) else 0


def limits_given(options: ScoreOptions) -> dict[str, Any]:
    """The keys of stage.code among the options. Raises ConfigError where no program is run."""
    names = ("cpu_seconds", "memory_mb", "partial_credit")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and options.reward != "code":
        option = f"--{next(iter(given))}".replace("_", "-")
        raise ConfigError(f"{option} is for --reward code; leave it out with --reward {options.reward}")
    return given


def custom_reward(options: ScoreOptions) -> CustomRewards:
    """The reward of this name alone, with the limits of conf/. Raises ConfigError."""
    known = {*REWARDS, *RULE_REWARDS, *(reward.name for reward in installed())}
    if not options.plugins and options.reward not in known:
        near = nearest(options.reward, sorted({*known} - {*RULE_REWARDS} | {*REWARDS}))
        raise ConfigError(f"--reward {options.reward} is no rule, not installed, and in no --plugin; {near}")
    chosen = {"plugins": options.plugins, "weights": {options.reward: 1.0}}
    mapping = read("stage/part/rl")["rewards"] | chosen
    try:
        found = CustomRewards(build(RewardsConfig, mapping, "stage.rewards"))
    except ConfigError as error:
        message = str(error)
        for key, option in OPTIONS.items():
            message = message.replace(key, option)
        raise ConfigError(message) from None
    if not found.names:
        raise ConfigError(
            f"--reward {options.reward} needs a run; give {', '.join(REWARDS)}, or a custom reward"
        )
    return found


def scores_of(
    pairs: Sequence[tuple[Prompt, Completion]], reward: str, custom: CustomRewards | None
) -> list[Score | None]:
    """The score of each completion; None where a custom reward has no rule for its prompt. Neighbours whose
    prompts have the same question, answer and checker are one group."""
    if custom is None:
        prompts, completions = [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
        return [row[REWARDS[reward]] for row in score_all(prompts, completions, [REWARDS[reward]])]
    same = groupby(pairs, key=lambda pair: (pair[0].question, pair[0].answer, pair[0].checker))
    members = [[*group] for _, group in same]
    groups = [(group[0][0], [completion for _, completion in group]) for group in members]
    return [*chain.from_iterable(custom.score(reward, groups))]


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
    fields = FIELDS.get(options.reward, ("completion",))
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
    if options.reward not in REWARDS and isinstance(row.get("checker"), dict):
        checker |= row["checker"]
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
