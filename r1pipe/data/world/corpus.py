"""The pre-training corpus: it makes the base model mediocre, with room to improve.

Worked solutions in several strategies, some wrong, some mixing languages, few in the right format; drills;
parallel sentences; general text. How much of each: data/world/corpus.json. Few (`thorough`) go on after a try
that missed; `data.thorough=false` leaves those out, which is the experiment on where reflection comes from.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from r1pipe.chat.template import ASSISTANT, BOS, EOS, USER, compose_response, parse
from r1pipe.core.types import Demonstration, Prompt
from r1pipe.data.world import countdown, general, judging, program, word
from r1pipe.data.world.content import LANGUAGES, choose, content, draw_until, index, split_of

TASKS = {"word": word, "countdown": countdown, "program": program, judging.TASK: judging}
SOURCE = "world"  # of every prompt and response, for the record
Strategy = Literal["careful", "terse", "guess", "thorough"]


def draw_prompt(rng: random.Random, split: str, task: str, language: str, level: int = 0) -> Prompt:
    """A prompt of this split: redrawn until its key falls into it. Raises DataError where none does."""

    def make() -> Prompt:
        if task in TASKS:
            return TASKS[task].make(rng, language, level)
        return general.make(rng, task, language)

    wanted = f"prompt of split {split}; use another split, or add to the texts in data/world"
    return draw_until(make, lambda prompt: split_of(prompt.checker["key"]) == split, wanted)


def reasoning_demonstration(
    prompt: Prompt, rng: random.Random, styles: dict[str, float], slip: float
) -> Demonstration:
    """A worked solution in a strategy drawn by weight; it may be wrong."""
    strategy = choose(rng, styles)
    reasoning, summary = TASKS[prompt.task].solve(prompt, strategy, rng, slip)
    return demonstration(prompt, compose_response(reasoning, summary), strategy)


def demonstration(prompt: Prompt, response: str, strategy: str = "") -> Demonstration:
    return Demonstration(prompt, response, strategy, SOURCE, licence=prompt.licence)


def strategy_of(prompt: Prompt, text: str) -> Strategy | Literal["other"]:
    """Which strategy a response follows, from its text alone: reinforcement shifts their shares.

    thorough (Countdown: more than one try is worked out), careful (one equation per step; one try), terse
    (steps joined; a try without steps) or guess (a result).
    """
    reasoning = parse(text).reasoning or text
    if prompt.task == "word":
        equations = len(re.findall(r"\d=\d", reasoning))
        return "careful" if equations >= len(prompt.checker["steps"]) else "terse" if equations else "guess"
    if prompt.task == "countdown":
        worked_out = re.findall(r"=-?\d+[+-]\d+=.*\?", reasoning)
        if worked_out:
            return "thorough" if len(worked_out) > 1 else "careful"
        return "terse" if "?" in reasoning else "guess"
    if prompt.task == "program":
        return "careful" if len(re.findall(r"`[^`\n]+`", reasoning)) >= 2 else "terse"
    return "other"


def shares_of(styles: Mapping[str, float], thorough: bool) -> dict[str, float]:
    """The shares of the strategies. Without `thorough` those who would go on after a try that missed are
    careful, which differs in nothing else."""
    shares = dict(styles)
    if not thorough and "thorough" in shares:
        shares["careful"] = shares.get("careful", 0.0) + shares.pop("thorough")
    return shares


class Documents(Iterator[str]):
    """Endless documents of the train split, special tokens written out."""

    def __init__(self, seed: int, thorough: bool = True):
        self._rng = random.Random(f"{seed}/corpus")
        self._styles = shares_of(content("corpus")["styles"], thorough)
        self._makers = {"reasoning": _reasoning, "drill": _drill, "parallel": _parallel, "general": _general}

    def __next__(self) -> str:
        language = self._rng.choice(LANGUAGES)
        kind = choose(self._rng, content("corpus")["documents"])
        return BOS + self._makers[kind](self._rng, language, self._styles) + EOS

    @property
    def state(self) -> tuple[Any, ...]:
        """Where the next document begins: that of the random numbers. Setting it seeks."""
        return self._rng.getstate()

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        self._rng.setstate(state)


def _reasoning(rng: random.Random, language: str, styles: Mapping[str, float]) -> str:
    """A worked solution; in plain text sometimes a page of exercises."""
    shares = content("corpus")
    layout = choose(rng, shares["layouts"])
    several = layout == "text" and rng.random() < shares["exercises"]
    solved = []
    for _ in range(rng.randint(2, 4) if several else 1):
        level = int(choose(rng, shares["levels"]))
        prompt = draw_prompt(rng, "train", choose(rng, shares["tasks"]), language, level)
        written = prompt
        if rng.random() < shares["mixed_language"]:  # reasoning in the other language than the question's
            written = replace(prompt, language=LANGUAGES[1 - index(language)])
        reasoning, summary = TASKS[prompt.task].solve(written, choose(rng, styles), rng, shares["slip"])
        solved.append(_laid_out(layout, prompt, reasoning, summary))
    return "\n".join(solved)


def _general(rng: random.Random, language: str, styles: Mapping[str, float]) -> str:
    shares = content("corpus")
    kind = choose(rng, shares["kinds"])
    if kind == "facts" and rng.random() < shares["statements"]:
        return _statements(rng, language)
    prompt = draw_prompt(rng, "train", kind, language)
    thought, answer = general.respond(prompt, rng, shares["general_right"], shares["written_manner"])
    return _laid_out(choose(rng, shares["layouts"]), prompt, thought, answer)


def _laid_out(layout: str, prompt: Prompt, reasoning: str, summary: str) -> str:
    """In a layout of the corpus; only one, `tags`, has the think tags that R1's format asks for."""
    if layout == "tags":
        answer = compose_response(reasoning, summary)
    else:
        answer = summary if layout == "short" else f"{reasoning}\n{summary}"
    if layout == "text":
        return f"{('Question: ', '问：')[index(prompt.language)]}{prompt.question}\n{answer}"
    return f"{USER}{prompt.question}{ASSISTANT}{answer}"


def _statements(rng: random.Random, language: str) -> str:
    """Facts are stated in plain text too: knowledge comes from pre-training."""
    facts, at = content("facts")["facts"], index(language)
    statements = []
    for _ in range(4):
        relation = rng.choice(list(facts))
        row = rng.choice(facts[relation])
        statements.append(general.state_fact(relation, row[2 * at], row[2 * at + 1], at))
    return ("" if at else " ").join(statements)


def _drill(rng: random.Random, language: str, styles: Mapping[str, float]) -> str:
    """Bare arithmetic and sorting, sometimes a try of Countdown: one, as two would look like a search."""
    lines = []
    for _ in range(8):
        kind = rng.randrange(5)
        a, b = rng.randint(1, 199), rng.randint(1, 60)
        if kind == 0:
            lines.append(f"{a}+{b}={a + b}")
        elif kind == 1:
            lines.append(f"{max(a, b)}-{min(a, b)}={max(a, b) - min(a, b)}")
        elif kind == 2:
            lines.append(f"{a % 60 + 2}*{b % 4 + 2}={(a % 60 + 2) * (b % 4 + 2)}")
        elif kind == 3:
            k = b % 4 + 2
            lines.append(f"{a // k * k}/{k}={a // k}")
        else:
            numbers = [rng.randint(1, 60) for _ in range(rng.randint(3, 5))]
            ordered = sorted(numbers, reverse=True)
            lines.append(f"{' '.join(map(str, numbers))} > {' '.join(map(str, ordered))}")
    if rng.random() < content("corpus")["tries"]:
        lines[rng.randrange(8)] = countdown.drill(rng, index(language))
    return "\n".join(lines)


def _parallel(rng: random.Random, language: str, styles: Mapping[str, float]) -> str:
    """Sentences in both languages; those of held-out translations are never shown."""
    lines: list[str] = []
    while len(lines) < 4:
        english, chinese = general.sentence_pair(rng)
        if split_of(f"translation|{english}") == "train":
            lines.append(f"{english} {chinese}" if language == "en" else f"{chinese} {english}")
    return "\n".join(lines)
