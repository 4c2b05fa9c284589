"""From what is judged to a prompt for the judge, and from its answer to a verdict.

What is judged cannot speak to the judge. Each text stands between two marks, of which a number is part that
no text inside can know, as it is computed from all of them; a mark or a verdict that is written inside is
broken up. And a verdict is read strictly: where there is any doubt, there is none.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping

from r1pipe.chat.template import parse
from r1pipe.config.judge import JudgePrompt
from r1pipe.core.types import Message, Prompt

NAMES = {  # places of the prompts -> how the marks call them
    "question": "question",
    "answer": "answer",
    "answer_a": "answer A",
    "answer_b": "answer B",
    "reference": "reference answer",
}
_MARK = re.compile(r"([<＜〈《])(\s*/?\s*(?:question|answer|reference))", re.IGNORECASE)
_BRACKETS = re.compile(r"([\[【［])(?=\s*[\[【［])")


def judged_part(prompt: JudgePrompt, response: str) -> str:
    """The part of a response that a judge sees."""
    return parse(response).summary if prompt.reads == "summary" else response.strip()


def question_of(prompt: Prompt) -> str:
    """The user's words: with what was said before, if anything was."""
    if not prompt.context:
        return prompt.question
    turns = [*prompt.context, Message("user", prompt.question)]
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def filled(prompt: JudgePrompt, nonce: bool, texts: Mapping[str, str], name: str) -> Prompt:
    """The prompt with these texts quoted in its places; `name` begins its id."""
    number = _number(texts.values()) if nonce else ""
    quoted = {place: _quoted(NAMES[place], text, number) for place, text in texts.items()}
    user = re.sub(r"\{(\w+)\}", lambda place: quoted[place[1]], prompt.user)
    before = (Message("system", prompt.system),) if prompt.system else ()
    digest = hashlib.sha256(f"{prompt.system}\0{user}".encode("utf-8", "surrogatepass")).hexdigest()
    return Prompt(f"{name}-{digest[:16]}", "judge", "en", user, context=before)


def _quoted(name: str, text: str, number: str) -> str:
    mark = f"{name} {number}".rstrip()
    return f"<{mark}>\n{_defused(text)}\n</{mark}>"


def _defused(text: str) -> str:
    """Without anything that reads as a mark or a verdict."""
    return _BRACKETS.sub(r"\1 ", _MARK.sub(r"\1 -\2", text))


def _number(texts: Iterable[str]) -> str:
    """Six hexadecimal digits that occur in none of the texts."""
    joined = "\0".join(texts)
    digest = joined.encode("utf-8", "surrogatepass")
    while True:
        digest = hashlib.sha256(digest).digest()
        if (number := digest.hex()[:6]) not in joined:
            return number


def read_verdict(text: str, verdicts: Mapping[str, float]) -> float | None:
    """What a judge's answer says; None where that cannot be read.

    The last line must be [[...]] with a known verdict and nothing else, and no other verdict may stand
    elsewhere in the answer. What it has thought before is not looked at.
    """
    summary = parse(text).summary
    lines = [line.strip() for line in summary.splitlines() if line.strip()]
    last = re.fullmatch(r"\[\[([^\[\]]*)\]\]", lines[-1]) if lines else None
    if last is None or last[1] not in verdicts:
        return None
    stated = {label for label in re.findall(r"\[\[([^\[\]]*)\]\]", summary) if label in verdicts}
    return verdicts[last[1]] if stated == {last[1]} else None
