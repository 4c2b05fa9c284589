"""Where the final part of a response states an answer: boxes, answer tags, sentences with a mark."""

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?|<answer>", re.IGNORECASE)
_MARK = re.compile(
    r"""\#\#\#\#|
    (?:\b(?:final|correct|right|our)\s+)?\b(?:answers?|solutions?|result|choice|option)\b
        (?:\s+(?:to\s+[^.:\n]{1,60}?|here|therefore|thus|hence))?
        (?:\*\*|[)"'\s])*?
        (?:\s*(?:is|are|was|be|equals?)\b(?:\s+(?:therefore|thus|then|given\s+by|simply|just|as\s+follows))*
           |\s+(?:should|must|will|would|comes?\s+out)\s+(?:be|to(?:\s+be)?)\b|\s*(?:[:：=]|\*\*\s*[:：]))
    |^\W*(?:the\s+)?(?:final\s+)?answer\W*$
    |(?:最终|正确|最后)?(?:答案|结果|选项)(?:应该|应当|应)?(?:就|大约|大概|约)?(?:是|为|选|等于|约为|约是|[:：])
    |(?:答|故选|应选|应该选|所以选|因此选|选择|选)\s*[:：]?\s*(?=[（(]?[A-Ja-j]\b|[（(]?[A-J][^A-Za-z]|[（(]?[A-J]$)
    |^\s*答\s*[:：]
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
# \! and \; are LaTeX's spaces
_SENTENCE_END = re.compile(r"\n|。|(?<!\\)(?<!approx)[.!?;](?=\s|$)|[；！？]|<｜|\\boxed")
_OPENING = re.compile(r"(?:[\s:：#>=]|\*\*(?=\s)|(?:\$\$|\\\[)(?=[ \t]*\n))*")
_MAX_STATEMENTS = 16
_MAX_LENGTH = 2000  # characters of an answer; bounds the work


@dataclass(frozen=True)
class Statement:
    """An answer as it was written, in a box or in a sentence that may say more.

    Its text is empty where a box is empty, or cut off, or longer than any answer.
    """

    text: str
    boxed: bool
    start: int
    end: int


def boxes(text: str) -> list[Statement]:
    """The contents of \\boxed{}, \\boxed 5 and <answer></answer>, in order."""
    found = []
    at = 0
    while match := _BOX.search(text, at):
        at = match.end()
        if match[0].lower() == "<answer>":
            end = text.lower().find("</answer>", at)
            content, at = (text[at:end], end + 9) if end >= 0 else ("", len(text))
        elif match["brace"]:
            end = closing_brace(text, at)
            content, at = (text[at:end], end + 1) if end >= 0 else ("", len(text))
        else:
            token = re.match(r"\s*(\\?\w+|[^\s\\{}])", text[at:])
            content = token[1] if token else ""
            at += token.end() if token else 0
        content = content.strip() if len(content) <= _MAX_LENGTH else ""
        found.append(Statement(content, True, match.start(), at))
    return found


def closing_brace(text: str, at: int) -> int:
    """Where the brace that was opened before `at` closes; -1 where it does not."""
    depth = 1
    for match in re.compile(r"(?<!\\)[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return -1


def statements(summary: str) -> list[Statement]:
    """What a summary states as its answer, in the order of the text, at most the last 16."""
    boxed = boxes(summary)
    found = list(boxed)
    for match in _MARK.finditer(summary):
        if any(box.start < match.start() < box.end for box in boxed):
            continue
        opening = _OPENING.match(summary, match.end())
        assert opening is not None
        rest = summary[opening.end() :]
        if rest.startswith(("\\boxed", "\\fbox", "<answer>", "$\\boxed", r"\(\boxed")):
            continue
        end = _SENTENCE_END.search(rest)
        text = rest[: end.start()] if end else rest
        if text.strip("*$ ()") and len(text) <= _MAX_LENGTH:
            found.append(Statement(text.strip(), False, match.start(), opening.end() + len(text)))
    return sorted(found, key=lambda statement: statement.start)[-_MAX_STATEMENTS:]
