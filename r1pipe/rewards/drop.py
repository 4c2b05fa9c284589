"""DROP's own scores: exact match and F1 of words (Dua et al., arXiv 1903.00161; AllenNLP's drop_eval.py).

The gold answer holds all right ones between bars: "3|three". The answer of a response is what follows its
last "Answer:", else all of its summary, as in openai/simple-evals.
"""

import re
import string

from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt, Score

TASK = "drop"
_STATED = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_drop(prompt: Prompt, summary: str) -> Score:
    """1 where the answer has the same words as a right one, in the same order."""
    said = normalised(stated(summary))
    found = any(said == normalised(right) for right in _golds(prompt))
    return Score(float(found), detail="" if found else f"{said!r} is not {prompt.answer!r}")


def f1(prompt: Prompt, summary: str) -> float:
    """The best F1, in 0..1, of the answer's words against those of a right one."""
    words = {*normalised(stated(summary)).split()}
    return max((_overlap(words, {*normalised(right).split()}) for right in _golds(prompt)), default=0.0)


def check_drop_gold(prompt: Prompt) -> None:
    if not _golds(prompt):
        raise DataError(f"{prompt.id}: the gold answer {prompt.answer!r} is empty; fill it in")


def vote_of_drop(prompt: Prompt, summary: str) -> str:
    return normalised(stated(summary))


def stated(summary: str) -> str:
    """The answer as it is written."""
    found = _STATED.findall(summary)
    return found[-1] if found else summary


def normalised(text: str) -> str:
    """Lower-case words without articles and punctuation; a number is written as a float."""
    parts = (_word(part) for part in re.split("[ -]", text.lower()))
    return " ".join(part for part in parts if part)


def _word(text: str) -> str:
    bare = text if _is_number(text) else text.translate(_PUNCTUATION)
    number = str(float(bare)) if _is_number(bare) else bare
    return " ".join(_ARTICLES.sub(" ", number).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _overlap(said: set[str], right: set[str]) -> float:
    """F1 of two bags of words; 0 where the right one has numbers and none of them is said."""
    numbers = {word for word in right if _is_number(word)}
    if numbers and not numbers & said:
        return 0.0
    common = len(said & right)
    precision = common / len(said) if said else 1.0
    recall = common / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _golds(prompt: Prompt) -> list[str]:
    return [right for right in prompt.answer.split("|") if right.strip()]
