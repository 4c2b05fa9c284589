"""Which strategy a response follows, from its text alone: reinforcement shifts their shares."""

import re
from typing import Literal

from r1pipe.chat.template import parse
from r1pipe.core.types import Prompt

Strategy = Literal["careful", "terse", "guess"]


def strategy_of(prompt: Prompt, text: str) -> Strategy | Literal["other"]:
    """careful (one equation per step, a search in order), terse (steps joined) or guess (a result)."""
    reasoning = parse(text).reasoning or text
    if prompt.task == "word":
        equations = len(re.findall(r"\d=\d", reasoning))
        return "careful" if equations >= len(prompt.checker["steps"]) else "terse" if equations else "guess"
    if prompt.task == "countdown":
        chained = re.findall(r"=\d+[+-]\d+=", reasoning)
        if not chained:
            return "terse"
        return "careful" if re.search(r"^(Sort|排序)", reasoning) else "guess"
    if prompt.task == "program":
        return "careful" if len(re.findall(r"`[^`\n]+`", reasoning)) >= 2 else "terse"
    return "other"
