"""Language consistency: does the model reason in the language of the question?

Sample: a Chinese question answered by "先算 3+4=7，then multiply" scores 2/4: 先, 算 against then, multiply.
"""

import re

from r1pipe.chat.template import PLAIN_TOKENS, parse
from r1pipe.core.types import Completion, Prompt, Score

_OPENING = re.compile(
    r"```|`|\$\$|\$|\\\(|\\\[|(?P<command>\\[A-Za-z]+)|(?P<tag></?\w+>)|<[|｜][^\s<>|｜]{1,40}[|｜]>"
)
_CLOSING = {"```": "```", "`": "`", "$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_ONE_LINE = ("`", "$")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[^\W\d_\u3400-\u9fff\uf900-\ufaff]{2,}(?:['’][a-z]+)?")  # single letters are variables
_WORDS = {"en": _LATIN, "zh": _CJK}
_FREE_WORDS = 32  # in code and formulas, however little prose there is: two lines of a program hold as many


def language_share(text: str, language: str) -> float:
    """Words of `language` ("en", "zh") over words of both; a Chinese character is a word.

    Numbers and operators do not count, nor do code, formulas, tags and LaTeX commands, as long as they hold
    no more words than the prose around them (or _FREE_WORDS): words beyond that count by their language, so
    that prose cannot hide in backticks. A fence that is never closed extends to the end, as in Markdown;
    any other unclosed mark hides nothing. Without any word the share is 1. Time is linear in the text.
    """
    prose, inside = _parts(text)
    outer, inner = _count(prose), _count(inside)
    hidden = sum(inner.values())
    beyond = hidden - max(sum(outer.values()), _FREE_WORDS)
    counts = {name: outer[name] + inner[name] * max(0, beyond) / max(1, hidden) for name in _WORDS}
    total = sum(counts.values())
    return counts[language] / total if total else 1.0


def _count(text: str) -> dict[str, int]:
    return {name: len(pattern.findall(text)) for name, pattern in _WORDS.items()}


def _parts(text: str) -> tuple[str, str]:
    """The prose of a text, and the contents of its code, formulas, tags and commands."""
    prose, inside, kept_to, at = [], [], 0, 0
    unclosed = set()  # marks without an end further on are looked for once: the work stays linear
    while opening := _OPENING.search(text, at):
        mark, at, end = opening[0], opening.end(), opening.end()
        if mark in _CLOSING:
            end = -1 if mark in unclosed else text.find(_CLOSING[mark], at)
            if end < 0 and mark == "```":
                end = len(text)  # as in Markdown
            if end < 0:
                unclosed.add(mark)
            if end < 0 or (mark in _ONE_LINE and "\n" in text[at:end]):
                continue
            content = text[at:end]
            inside.append(content if "`" in mark else _COMMAND.sub(" ", content))
            end += len(_CLOSING[mark])
        elif (opening["tag"] or opening["command"]) and mark not in PLAIN_TOKENS:
            inside.append(mark)
        prose.append(text[kept_to : opening.start()])
        kept_to = at = end
    return " ".join([*prose, text[kept_to:]]), " ".join(inside)


def language(prompt: Prompt, completion: Completion) -> Score:
    """Share of the target language's words in the chain of thought (R1 section 2.3.2).

    "calculated as the proportion of target language words in the CoT", and added to the other rewards.
    A response that is not well formed is all reasoning; an empty one earns nothing.
    """
    parsed = parse(completion.text)
    text = parsed.reasoning if parsed.well_formed else completion.text
    return Score(language_share(text, prompt.language) if text.strip() else 0.0)
