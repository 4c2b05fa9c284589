"""Where the final part of a response states an answer: boxes, answer tags, sentences with a mark."""

import re
from dataclasses import dataclass

from r1pipe.rewards.answers.notation import tidy
from r1pipe.rewards.answers.number import read_number

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?P<brace>\{)?|<answer>", re.IGNORECASE)
_MARK = re.compile(
    r"""\#\#\#\#|
    (?:\b(?:final|correct|right|our)\s{1,9})?\b(?:final_)?(?:answers?|solutions?|result|choice|options?)\b
        (?:\s{1,9}(?:to\s{1,9}[^.:\n]{1,60}?|here|therefore|thus|hence))?
        (?:\*\*|[)"'\s]){0,6}?
        (?:\s{0,9}\b(?:is|are|was|be|equals?)\b(?:\s{1,9}(?:therefore|thus|then|given\s{1,9}by|simply|just|as\s{1,9}follows))*
           |\s{1,9}(?:should|must|will|would|comes?\s{1,9}out)\s{1,9}(?:be|to(?:\s{1,9}be)?)\b|\s{1,9}of(?=\s{1,9}[-$\\\d])
           |\s{0,9}(?:[:：=]|\*\*\s{0,9}[:：]))
    |^[^\w\n]{0,9}(?:the\s{1,9})?(?:final\s{1,9})?answer[^\w\n]{0,9}$
    |(?:最终|正确|最后)?(?:答案|结果|选项)(?:应该|应当|应)?(?:就|大约|大概|约)?(?:\*\*)?\s{0,9}(?:是|为|选|等于|约为|约是|[:：])
    |(?:答|故选|应选|应该选|所以选|因此选|选择|选)\s{0,9}[:：]?\s{0,9}(?=[（(]?[A-Ja-j]\b|[（(]?[A-J]{1,6}(?![A-Za-z]))
    |^[ \t]{0,9}答\s{0,9}[:：]|【答案】|选项(?=[A-J]正确)|答案係
    |\b(?:respuesta|réponse|antwort|resposta|risposta|ответ|wynik|odpowiedź|jawaban|cevap)
        (?:\s{1,9}(?:finale?|final|correcta?|correcte))?\s{0,9}(?:\b(?:es|est|ist|to|adalah)\b|é|è|[:：—])
    |(?:答え|正解|정답|답)\s{0,9}(?:は|은|[:：])
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
# \! and \; are LaTeX's spaces
_SENTENCE_END = re.compile(r"\n|。|(?<!\\)(?<!approx)(?:[.?;]|!(?!\s*[=+*/^-]))(?=\s|$)|[；！？]|<｜|\\boxed")
_OPENING = re.compile(r"(?:[\s:：#>=]|\*\*(?=\s)|(?:\$\$|\\\[)(?=[ \t]*\n)|(?<=\n)[-•]\s+)*")
# What makes something else of a statement that stands behind it.
_NEGATED = re.compile(
    r"\b(?:wrong|incorrect|previous|mistaken|false|doubt(?:\s+that)?|wrong\s+that)\s+(?:the\s+)?$|"
    r"(?:错误?|误|不|非|排除|不能|不应|不可)的?$",
    re.IGNORECASE,
)
_NOT_A_BOX = re.compile(
    r"(?:\b(?:can)?not|\bnever|n['’]t)(?:\s+(?:simply|just|be|equal|to|the))*\s*\$*$|"
    r"\b(?:wrong|incorrect|mistaken)\s+(?:answer|value|result|choice)\s+(?:is|was|would\s+be)\s*:?\s*\$*$|"
    r"(?:不是|并非|不等于|不应是)\s*\$*$",
    re.IGNORECASE,
)
_FACTOR_BEFORE = re.compile(
    r"(?:(?:^|[^\s])-|(?<![.\d])\d|[+/^_]|[\w)}][ \t]*[<>]|[\^_][ \t]*\{|[A-Za-z]\(|"
    r"\\(?:sqrt|[dt]?frac(?:\{[^{}]*\})?|cdot|times|pm|log|ln|lg|exp|sin|cos|tan|ge|le|ne|geq|leq|neq|neg)"
    r"[ \t]*[{(]?)$"
)
_FACTOR_BEHIND = re.compile(
    r"(?!\*\*)[ \t]*(?:\^|[+*/][ \t]*\S|-[ \t]*\d|!\s*\$|\\(?:pi|sqrt|cdot|times|choose)(?![A-Za-z])|"
    r"\d|_[\d{])|\$?[ \t]*(?:[百千万亿十]|的[平立次倒]|(?:million|billion|thousand|hundred|trillion|dozen|"
    r"percent\s+of)\b)|"
    r"[A-Za-z](?![A-Za-z])|\([-\w]{1,3}[+-]|\(\d+\)|[.:]\d|,\d{3}(?!\d)"
)
_BEHIND_A_BOX = re.compile(r"(?P<rest>(?:[^.;!?\n。；！？]|(?<=\d)\.(?=\d)){0,60})")
_ALTERNATIVE = re.compile(r",?\s*(?:or|或者?)\s*(?P<value>\S.*)")
_DENIED = re.compile(
    r"[ \t$.*;,]*(?:(?:it|that|this|which)\s+)?(?:(?:is|was|would\s+be|seems)\s+)?(?:(?:a|the)\s+common\s+)?"
    r"(?:wrong|incorrect|false|mistake|alternatively|not\s+(?:right|correct|the)|no\b(?!\w)|or\b(?!\s+equivalently))|"
    r"[ \t$]*(?:[?？]|吗|是?(?:错误?的|不对|不正确))",
    re.IGNORECASE,
)
# What takes an answer back further on: "However, this is incorrect", "Sorry, I meant 6".
_NEGATIVE = (
    r"(?:wrong|incorrect|false|invalid|impossible|a\s+mistake|an\s+error|"
    r"not\s+(?:right|correct|valid|possible|an?\s+integer\b(?!\s+\w))|"
    r"(?:can(?:no|')?t|could\s*n[o']t)\s+be\s+(?:right|correct|true)|"
    r"(?:does\s*n[o']t|fails\s+to)\s+(?:satisfy|work|hold|fit|make\s+sense))"
)
_TAKEN_BACK = re.compile(
    rf"\b(?:however|but|unfortunately|wait|hmm+|oops|actually)\b[\s,.:!]*(?:\w+[\s,]+)?"
    rf"(?:this|that|it|the\s+(?:answer|above)|my\s+answer)"
    rf"(?:\s+(?:answer|result|value))?['’]?s?\s+(?:\w+\s+){{0,2}}?{_NEGATIVE}|"
    rf"(?:^|[.!\n]\s*)(?:this|that|it)(?:\s+(?:answer|result|value))?\s+(?:is|was|seems|must\s+be)?\s*{_NEGATIVE}|"
    r"\bbut\s+(?:this|that|it)\s+(?:ignores|forgets|overlooks)|(?:^|[.!\n]\s*)correction\s*:|\bI\s+mean(?:t\b|\s+\$?-?\d)|"
    r"\b(?:sorry|oops)\b[\s,]*\$?-?\d|"
    r"(?:但是?|不过|然而|可是|等等|抱歉)[，,\s]*(?:这|它|该|此)?(?:个?答案|个?结果)?[^。，,\n]{0,4}"
    r"(?:不对|错|有误|不满足|不成立|不正确)|"
    r"更正\s*[:：]|(?:^|[。！!\n])[\s$。]*(?:这)?不对|^[\s。？?]*不[，,]\s*(?:应该?)?是",
    re.IGNORECASE,
)
_LOOKED_BEYOND = 300  # characters behind an answer that may take it back
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
        before = text[max(0, match.start() - 40) : match.start()].replace("**", "").rstrip(" ")
        content = _with_what_follows(content, text, at)
        if _FACTOR_BEFORE.search(before) or _NOT_A_BOX.search(before) or len(content) > _MAX_LENGTH:
            content = ""
        found.append(Statement(content, True, match.start(), at))
    return found


def _with_what_follows(content: str, text: str, at: int) -> str:
    """A box's content with the unit, scale or alternative behind it: \\boxed{5} km, \\boxed{1/2} or 0.5.

    Empty where it is a part of more, or denied.
    """
    found = _BEHIND_A_BOX.match(text, at)
    rest = tidy(re.sub(r"^[ \t]*(?:\$+|\\\))|\$+$", " ", found["rest"])).strip("* ") if found else ""
    if alternative := _ALTERNATIVE.match(rest):
        return f"{content} or {alternative['value']}"
    number = read_number(tidy(content)) if rest else None
    whole = read_number(f"{tidy(content)} {rest}") if number else None
    if (
        number
        and whole
        and (whole.value, whole.unit, whole.percent) != (number.value, number.unit, number.percent)
    ):
        return f"{content} {rest}"
    is_part_of_more = _FACTOR_BEHIND.match(text, at) or _FACTOR_BEHIND.match(f" {rest}")
    return "" if is_part_of_more or _DENIED.match(text, at) else content


def is_taken_back(summary: str, statement: Statement) -> bool:
    """Whether what follows an answer says that it is wrong."""
    return _TAKEN_BACK.search(summary[statement.end : statement.end + _LOOKED_BEYOND]) is not None


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
        is_question = summary.startswith(("?", "？"), behind) or text.endswith("吗")
        if is_question or _DENIED.match(summary, behind):
            continue
        if text.strip("*$ ()") and len(text) <= _MAX_LENGTH:
            found.append(Statement(text.strip(), False, match.start(), behind))
    return sorted(found, key=lambda statement: statement.start)[-_MAX_STATEMENTS:]
