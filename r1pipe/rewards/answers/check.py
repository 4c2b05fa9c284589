"""Whether a response's final answer is right, by the gold answer's form."""

import re
from collections.abc import Sequence

from r1pipe.core.types import Score, Status
from r1pipe.rewards import symbolic
from r1pipe.rewards.answers import words
from r1pipe.rewards.answers.comparison import Comparison
from r1pipe.rewards.answers.gold import Form, Gold, is_text
from r1pipe.rewards.answers.notation import UNREADABLE, to_latex
from r1pipe.rewards.answers.reading import HEDGES, SEVERAL, final_answer, option_named, says_the_same
from r1pipe.rewards.answers.structure import Kind, Node, parse

_RESTATED = re.compile(
    r",?\s*\bor\b(?:\s+(?:about|approximately|equivalently)\b)?|或者?|,?\s*\b(?:i\.e\.?|that\s+is),?|\\approx"
)
_ABOUT = re.compile(r"\\approx|\bor\s+(?:about|approximately)\b")
_MAX_COMPARED = 16  # formulas of one problem that votes are compared with


def check(gold: Gold, summary: str) -> Score:
    """1 where the summary's final answer equals the gold answer or an alternative, each read in its form."""
    found = Score(0.0, detail=f"the summary states no final answer that is a {gold.form}")
    for right in (gold, *gold.alternatives):
        answer = final_answer(right, summary)
        if answer is None:
            continue
        try:
            if equal(right, answer):
                return Score(1.0)
        except symbolic.NoVerdict as failure:
            found = failure.score
            continue
        if found.status is Status.SCORED:
            found = Score(0.0, detail=f"{answer!r} is not {right.text!r}")
    return found


def equal(gold: Gold, text: str) -> bool:
    """Whether a tidy answer equals the gold answer. Raises symbolic.NoVerdict where the parser gives up."""
    match gold.form:
        case Form.CHOICE:
            is_together = re.fullmatch(r"[A-J]{2,6}", text) and len({*text}) == len(text)  # CA is AC
            chosen = set(text) if is_together else words.letters(text)
            return chosen == set(gold.text) or option_named(gold, text) == gold.text
        case Form.BOOLEAN:
            return words.truth(text) is words.truth(gold.text)
        case Form.DATE:
            return (words.date(text) or text) == words.date(gold.text)
        case Form.RATIO:
            return words.ratio(text) == words.ratio(gold.text)
        case Form.TEXT:
            return words.plain_words(text) == words.plain_words(gold.text)
    if text == gold.text:
        return True
    alternatives = _RESTATED.split(text) if gold.form not in SEVERAL else []
    if len(alternatives) > 1:  # 1/2 or 0.5; of an approximation one is enough
        verdicts = [equal(gold, each.strip()) for each in alternatives if each.strip()]
        is_about = _ABOUT.search(text) and says_the_same(alternatives[0], alternatives[-1])
        if verdicts and (all(verdicts) or (is_about and any(verdicts))):
            return True
    if HEDGES.search(text) or is_text(text):
        return False
    answer = parse(text)
    return gold.node is not None and answer is not None and Comparison(_same_formula).equal(gold.node, answer)


def _same_formula(gold: str, answer: str, relation: str) -> bool:
    if re.sub(r"\s+", "", gold) == re.sub(r"\s+", "", answer):
        return True
    if UNREADABLE.search(gold) or UNREADABLE.search(answer):
        return False
    return symbolic.equal(to_latex(gold), to_latex(answer), relation)


def votes(gold: Gold, summaries: Sequence[str]) -> list[str]:
    """What each summary votes for in cons@k, equal answers by one spelling; "" where it states none."""
    found: list[str] = []
    joined: dict[str, str] = {}  # how an answer is spelled -> the first spelling of an equal one
    formulas: dict[str, Node] = {}  # first spellings
    for summary in summaries:
        answer = final_answer(gold, summary)
        if answer is None:
            found.append("")
            continue
        spelling = _spelling(gold, answer)
        if spelling not in joined:
            joined[spelling] = spelling
            node = parse(answer) if gold.node and len(formulas) < _MAX_COMPARED else None
            if node and not node.number:
                equal_ones = (first for first, other in formulas.items() if _are_equal(other, node))
                joined[spelling] = next(equal_ones, spelling)
                formulas.setdefault(joined[spelling], node)
        found.append(joined[spelling])
    return found


def _are_equal(a: Node, b: Node) -> bool:
    try:
        return Comparison(_same_formula).equal(a, b)
    except symbolic.NoVerdict:
        return False


def _spelling(gold: Gold, answer: str) -> str:
    """One spelling for answers that are equal without a look at their formulas."""
    match gold.form:
        case Form.CHOICE:
            return "".join(sorted(words.letters(answer))) or option_named(gold, answer) or answer
        case Form.BOOLEAN:
            return str(words.truth(answer))
        case Form.DATE:
            return words.date(answer) or answer
        case Form.RATIO:
            return words.ratio(answer)
        case Form.TEXT:
            return words.plain_words(answer)
    node = parse(answer)
    if node and node.number and not (gold.number and gold.number.unit):
        return str(node.number.value)  # whatever is counted
    return _key(node) if node else words.plain_words(answer)


def _key(node: Node) -> str:
    if node.number:
        return node.number.key()
    if node.kind is Kind.RELATION and node.mark == "=":
        return _key(node.items[-1])
    if node.kind in (Kind.LIST, Kind.SET, Kind.UNION):
        return ",".join(sorted(map(_key, node.items)))
    if node.items:
        return f"{node.mark}{','.join(map(_key, node.items))}"
    return re.sub(r"\s+", "", to_latex(node.text))
