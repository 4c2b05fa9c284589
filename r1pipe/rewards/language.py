"""Language consistency: does the model reason in the language of the question?

Sample: a Chinese question answered by "先算 3+4=7，then multiply" scores 2/4: 先, 算 against then, multiply.
"""

import re

from r1pipe.data.chat import parse
from r1pipe.records import Completion, Prompt, Score

# Neither language: fenced and inline code, formulas, LaTeX commands, tags.
_UNCOUNTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?\w+>|<[|｜].*?[|｜]>",
    re.DOTALL,
)
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[^\W\d_\u3400-\u9fff\uf900-\ufaff]{2,}(?:['’][a-z]+)?")  # single letters are variables
_WORDS = {"en": _LATIN, "zh": _CJK}


def language_share(text: str, language: str) -> float:
    """Words of `language` ("en", "zh") over words of both; a Chinese character is a word.

    Numbers, operators, code and formulas are not counted; where nothing is left to count: 1.
    """
    prose = _UNCOUNTED.sub(" ", text)
    counts = {name: len(pattern.findall(prose)) for name, pattern in _WORDS.items()}
    total = sum(counts.values())
    return counts[language] / total if total else 1.0


def language(prompt: Prompt, completion: Completion) -> Score:
    """Share of the target language's words in the chain of thought (R1 section 2.3.2).

    "calculated as the proportion of target language words in the CoT", and added to the other rewards.
    A response that is not well formed is all reasoning; an empty one earns nothing.
    """
    parsed = parse(completion.text)
    text = parsed.reasoning if parsed.well_formed else completion.text
    return Score(language_share(text, prompt.language) if text.strip() else 0.0)
