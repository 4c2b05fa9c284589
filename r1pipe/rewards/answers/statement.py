"""Where the final part of a response states an answer: boxes, answer tags, sentences with a mark."""

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?P<brace>\{)?|<answer>", re.IGNORECASE)
_MARK = re.compile(
    r"""\#\#\#\#|
    (?:\b(?:final|correct|right|our)\s{1,9})?\b(?:answers?|solutions?|result|choice|option)\b
        (?:\s{1,9}(?:to\s{1,9}[^.:\n]{1,60}?|here|therefore|thus|hence))?
        (?:\*\*|[)"'\s]){0,6}?
        (?:\s{0,9}\b(?:is|are|was|be|equals?)\b(?:\s{1,9}(?:therefore|thus|then|given\s{1,9}by|simply|just|as\s{1,9}follows))*
           |\s{1,9}(?:should|must|will|would|comes?\s{1,9}out)\s{1,9}(?:be|to(?:\s{1,9}be)?)\b|\s{0,9}(?:[:：=]|\*\*\s{0,9}[:：]))
    |^[^\w\n]{0,9}(?:the\s{1,9})?(?:final\s{1,9})?answer[^\w\n]{0,9}$
    |(?:最终|正确|最后)?(?:答案|结果|选项)(?:应该|应当|应)?(?:就|大约|大概|约)?(?:\*\*)?\s{0,9}(?:是|为|选|等于|约为|约是|[:：])
    |(?:答|故选|应选|应该选|所以选|因此选|选择|选)\s{0,9}[:：]?\s{0,9}(?=[（(]?[A-Ja-j]\b|[（(]?[A-J]{1,6}(?![A-Za-z]))
    |^[ \t]{0,9}答\s{0,9}[:：]|【答案】|选项(?=[A-J]正确)
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
# \! and \; are LaTeX's spaces
_SENTENCE_END = re.compile(r"\n|。|(?<!\\)(?<!approx)(?:[.?;]|!(?!\s*[=+*/^-]))(?=\s|$)|[；！？]|<｜|\\boxed")
_OPENING = re.compile(r"(?:[\s:：#>=]|\*\*(?=\s)|(?:\$\$|\\\[)(?=[ \t]*\n)|(?<=\n)[-•]\s+)*")
# What makes something else of a statement that stands behind or before it.
_NEGATED = re.compile(
    r"\b(?:wrong|incorrect|previous|mistaken|false|doubt(?:\s+that)?|wrong\s+that)\s+(?:the\s+)?$|"
    r"(?:错误?|误|不|非|排除|不能|不应|不可)的?$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"[\s$.*;]*(?:(?:it|that|this)\s+(?:is|was)\s+|is\s+)?(?:wrong|incorrect|false|alternatively|not\s+(?:right|correct|the)|"
    r"no\b(?!\w)|or\b)",
    re.IGNORECASE,
)
_FACTOR_BEFORE = re.compile(
    r"(?:(?:^|[^\s])-|(?<![.\d])\d|[+/^_]|\\(?:sqrt|frac|cdot|times|pm)\s*\{?|\b[Nn]ot\s+\$?)$"
)
_FACTOR_BEHIND = re.compile(
    r"(?!\*\*)\s*(?:\^|[+*/]\s*\S|-\s*\d|!\s*\$|\\(?:pi|sqrt|cdot|times)(?![A-Za-z])|\d|\$?\s*(?:million|billion|thousand|hundred)\b)"
)
_MAX_STATEMENTS = 16
_MAX_LENGTH = 2000  # characters of an answer; bounds the work


@dataclass(frozen=True)
class Statement:
    """An answer as it was written, in a box or in a sentence that may say more.

    Its text is empty where a box is empty, cut off or longer than any answer, or a part of something else.
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
        before = text[max(0, match.start() - 12) : match.start()].replace("**", "").rstrip(" ")
        outside = (
            _FACTOR_BEFORE.search(before) or _FACTOR_BEHIND.match(text, at) or _TAKEN_BACK.match(text, at)
        )
        content = "" if outside or len(content) > _MAX_LENGTH else content.strip()
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
        before = summary[max(0, match.start() - 20) : match.start()]
        if any(box.start < match.start() < box.end for box in boxed) or _NEGATED.search(before):
            continue
        opening = _OPENING.match(summary, match.end())
        assert opening is not None
        rest = summary[opening.end() :]
        if rest.startswith(("\\boxed", "\\fbox", "<answer>", "$\\boxed", r"\(\boxed")):
            continue
        end = _SENTENCE_END.search(rest)
        text = rest[: end.start()] if end else rest
        behind = opening.end() + len(text)
        is_question = summary.startswith("?", behind)
        if is_question or _TAKEN_BACK.match(summary, behind):
            continue
        if text.strip("*$ ()") and len(text) <= _MAX_LENGTH:
            found.append(Statement(text.strip(), False, match.start(), behind))
    return sorted(found, key=lambda statement: statement.start)[-_MAX_STATEMENTS:]
