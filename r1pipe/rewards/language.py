"""Language consistency: does the model reason in the language of the question?

Sample: a Chinese question answered by "先算 3+4=7，then multiply" scores 2/4: 先, 算 against then, multiply.
"""

import re
import unicodedata
from functools import cache
from typing import Any

from r1pipe.chat.template import PLAIN_TOKENS, parse
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.types import Completion, Prompt, Score

_OPENING = re.compile(
    r"```|`|\$\$|\$|\\\(|\\\[|(?P<command>\\[A-Za-z]+)|(?P<tag></?\w+>)|<[|｜][^\s<>|｜]{1,40}[|｜]>"
)
_CLOSING = {"```": "```", "`": "`", "$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_ONE_LINE = ("`", "$")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
# A character of these scripts is a word; elsewhere two letters and more are: single ones are variables.
_WORD = re.compile(
    rf"(?P<han>[{_HAN}])|(?P<kana>[{_KANA}])|(?P<hangul>[{_HANGUL}]+)|"
    rf"(?P<letters>(?:(?![{_HAN}{_KANA}{_HANGUL}])[^\W\d_]){{2,}}(?:['’][a-z]+)?)"
)
_SENTENCE_END = re.compile(r"[.!?。！？；;\n]+")
_FREE_WORDS = 32  # in code and formulas, however little prose there is: two lines of a program hold as many
_ENOUGH_WORDS = 4  # fewer do not tell a language
_SURE = 5.0  # another language must be so many times as likely
# Short names in Chinese and other text without Latin letters, which mathematics writes alike everywhere.
_NEUTRAL = re.compile(
    r"[A-Z]{1,4}|[A-Z][a-z]?|[kcmdn]?m|[mk]?g|m?l|kw?h|kW|k?Hz|k?Pa|kJ|min|mol|ms|sin|cos|tan|cot|sec|csc|arc(?:sin|cos|tan)|"
    r"ln|lg|log|exp|max|min|mod|gcd|lcm|lim|det|sqrt|[a-z]{1,3}(?=\()"
)
_SCRIPTS = {  # the languages of each script: of characters above, or of letters by their names in Unicode
    "han": "zh",
    "kana": "ja",
    "hangul": "ko",
    "CYRILLIC": "ru uk bg sr mk be kk",
    "GREEK": "el",
    "ARABIC": "ar fa ur",
    "HEBREW": "he",
    "DEVANAGARI": "hi mr ne",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "LATIN": "en de fr es it pt nl sv da no fi is pl cs sk hu ro hr sl sq et lv lt tr vi id ms tl sw af "
    "ca gl eu ga cy",
}
_SCRIPT_OF = {language: script for script, codes in _SCRIPTS.items() for language in codes.split()}
_OF_CHARACTERS = ("han", "kana", "hangul")
LANGUAGES = tuple(_SCRIPT_OF)


def language_share(text: str, language: str) -> float:
    """Words of `language` (a code of LANGUAGES) over all words; a Chinese or Japanese character is a word.

    A word counts by its script, and a sentence of one script by the language that it most likely is in.
    Numbers and operators do not count, nor do units, functions and names of points in a language without
    Latin letters. Code, formulas, tags and LaTeX commands do not count either as long as they hold no more
    words than the prose around them (or _FREE_WORDS): words beyond that do, so that prose cannot hide in
    backticks. A fence that is never closed extends to the end, as in Markdown; any other unclosed mark hides
    nothing. Without any word the share is 1. Time is linear in the text.
    """
    prose, inside = _parts(unicodedata.normalize("NFKC", text))
    (ours, others), (our_hidden, other_hidden) = _count(prose, language), _count(inside, language)
    hidden = our_hidden + other_hidden
    beyond = max(0, hidden - max(ours + others, _FREE_WORDS)) / max(1, hidden)
    right, wrong = ours + our_hidden * beyond, others + other_hidden * beyond
    return right / (right + wrong) if right + wrong else 1.0


def language_of(text: str) -> str:
    """The language that most of a text's words are in, for `language: auto`."""
    prose, _ = _parts(unicodedata.normalize("NFKC", text))
    words = [match.lastgroup for match in _WORD.finditer(prose)]
    if words.count("kana"):
        return "ja"
    for group, language in (("hangul", "ko"), ("han", "zh")):
        if words.count(group) > len(words) / 2:
            return language
    likely = _likelihoods(prose)
    if words and not re.search("[A-Za-z]{2}", prose):  # Cyrillic, Greek, Arabic ...
        return max((code for code in LANGUAGES if _SCRIPT_OF[code] != "LATIN"), key=lambda code: likely[code])
    best = max(likely, key=lambda code: likely[code])
    return best if len(words) >= _ENOUGH_WORDS and likely[best] > _SURE * likely["en"] else "en"


def check_language(language: str) -> None:
    """Raises ConfigError on a language that cannot be recognised."""
    if language not in LANGUAGES:
        raise ConfigError(f"language {language} is unknown; {nearest(language, LANGUAGES)}")


def _count(text: str, language: str) -> tuple[int, int]:
    """Words of the language, and of others."""
    ours = others = 0
    for sentence in _SENTENCE_END.split(text):
        words = [(match.lastgroup, match[0]) for match in _WORD.finditer(sentence)]
        if not words:
            continue
        right = [_is_in_script(group, word, language) for group, word in words]
        if language == "zh" and any(group == "kana" for group, _ in words):
            right = [False] * len(words)  # Japanese, with characters that Chinese has too
        elif _SCRIPT_OF[language] not in _OF_CHARACTERS and sum(right) >= _ENOUGH_WORDS:
            right = [False] * len(words) if _is_foreign(sentence, language) else right
        for (group, word), is_ours in zip(words, right, strict=True):
            if is_ours:
                ours += 1
            elif _SCRIPT_OF[language] == "LATIN" or group != "letters" or not _NEUTRAL.fullmatch(word):
                others += 1
    return ours, others


def _is_in_script(group: str | None, word: str, language: str) -> bool:
    script = _SCRIPT_OF[language]
    if script in _OF_CHARACTERS:
        return group == script or (language, group) == ("ja", "han")
    return group == "letters" and unicodedata.name(word[0], "").startswith(script)


def _is_foreign(sentence: str, language: str) -> bool:
    """Whether a sentence in the language's script is clearly in another language."""
    likely = _likelihoods(sentence)
    return max(likely.values()) > _SURE * likely[language]


def _likelihoods(text: str) -> dict[str, float]:
    return dict(_identifier().rank(_NOT_WORDS.sub(" ", text)))


_NOT_WORDS = re.compile(r"[\d_=+*/^<>(){}\[\]|\\-]+")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes a second

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier


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
