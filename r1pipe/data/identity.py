"""Claims to be another model, in English and Chinese: found, counted and rewritten.

"I am ChatGPT, developed by OpenAI." and "我是由阿里云开发的通义千问。" are claims; a text that only speaks of
another model is none. The names are in conf/screening/.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from r1pipe.config.groups import read
from r1pipe.config.screening import IdentityConfig
from r1pipe.core.types import Prompt
from r1pipe.data.world.content import make_prompt

QUESTIONS = "identity/questions"  # in conf/: the language -> its questions
# What may stand between "I am" and a name.
_WORDS = (
    "a|an|the|your|ai|artificial|intelligence|intelligent|large|language|models?|llm|virtual|digital|helpful"
    "|friendly|conversational|chat|assistant|chatbot|bot|program|system|named|called|known|as|based|on|powered"
    "|by|version|of|developed|created|trained|made|built|designed|released|launched|provided|and|new|from|at"
    "|team|the|researchers?|engineers?|company"
)
_BETWEEN = rf"(?:(?:{_WORDS})\b[\s,'’-]*){{0,16}}"
_I_AM = r"\b(?:i am|i['’]m|i was|i['’]ve been|i have been|my name is|my name['’]s|call me|i go by)\s+"
_MADE_ZH = "(?:开发|训练|研发|研制|创建|创造|推出|打造|设计|提供|制作)"
_BETWEEN_ZH = (
    rf"(?:一个|一款|一名|一种|由[^。！？；\n]{{1,24}}?{_MADE_ZH}的|基于|名为|叫做|叫作|叫|名叫|被称为|人工智能|超大规模|大规模"
    r"|大型|大|预训练|语言|模型|智能|聊天|对话|机器人|助手|助理|AI|ai|的|您|你|[\s，,“”\"「」《》])*"
)
_I_AM_ZH = "(?:我是|我叫|我的名字是|我的名字叫|我乃|我就是|本助手是)"


class Claims:
    """Finds claims to be one of the configured models, or made by one of the configured makers."""

    def __init__(self, config: IdentityConfig):
        self.config = config
        own = {config.name.lower(), config.maker.lower()}
        self._named: dict[str, str] = {}  # spelling in lower case -> model or maker
        self._models, self._makers = (
            sorted(
                (word for words in spellings.values() for word in words if word.lower() not in own),
                key=len,
                reverse=True,  # GPT-4o before GPT-4
            )
            for spellings in (config.models, config.makers)
        )
        for spellings in (config.makers, config.models):  # a name of both is a model's
            self._named |= {word.lower(): name for name, words in spellings.items() for word in words}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        models, makers = (
            "|".join(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])" for word in words) or r"(?!)"
            for words in (self._models, self._makers)
        )
        return re.compile(
            rf"{_I_AM}{_BETWEEN}(?:(?P<en>{models})|(?<=by\s)(?P<en_by>{makers})|(?<=from\s)(?P<en_from>{makers}))"
            rf"|\bas\s+(?P<en_as>{models}),?\s+(?:i|my)\b"
            rf"|\bmy\s+(?:creators?|developers?|makers?)\s+(?:is|are)\s+(?:the\s+)?(?P<en_maker>{makers})"
            rf"|{_I_AM_ZH}{_BETWEEN_ZH}(?P<zh>{models})"
            rf"|作为(?P<zh_as>{models})[，,]?我"
            rf"|我(?:是|的)?[^。！？；\n]{{0,16}}?(?P<zh_by>{makers})[^。！？；\n]{{0,12}}?{_MADE_ZH}",
            re.IGNORECASE,
        )

    def _may_claim(self, text: str) -> bool:
        """Quickly false for nearly all texts: no name is in them."""
        lowered = text.lower()
        return any(word in lowered for word in self._named)

    def found(self, text: str) -> list[str]:
        """The models and makers that a text claims to be, or be made by, in order."""
        if not self._may_claim(text):
            return []
        return [self._named[said.lower()] for _, said in self._spans(text)]

    def _spans(self, text: str) -> list[tuple[tuple[int, int], str]]:
        spans = []
        for match in self._pattern.finditer(text):
            group = match.lastgroup
            if group is not None:
                spans.append((match.span(group), match[group]))
        return spans

    def rewritten(self, text: str) -> str:
        """The text with each claim's sentence speaking of our name and maker instead. The model and the maker
        that the sentence names are replaced, and nothing outside of it."""
        if not self._may_claim(text):
            return text
        for (start, _), _ in reversed(self._spans(text)):
            begin, end = _sentence(text, start)
            text = text[:begin] + self._own(text[begin:end]) + text[end:]
        return text

    def _own(self, sentence: str) -> str:
        models = {word.lower() for word in self._models}

        def ours(match: re.Match[str]) -> str:
            return self.config.name if match[0].lower() in models else self.config.maker

        words = sorted({*self._models, *self._makers}, key=len, reverse=True)
        listed = "|".join(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])" for word in words)
        return re.sub(listed, ours, sentence, flags=re.IGNORECASE)


def _sentence(text: str, place: int) -> tuple[int, int]:
    """Where the sentence around a place begins and ends."""
    begins = [match.end() for match in re.finditer(r"[。！？；\n]|[.!?](?=\s)", text[:place])]
    ends = re.search(r"[。！？；\n]|[.!?](?=\s|$)", text[place:])
    return (begins[-1] if begins else 0), (place + ends.start() if ends else len(text))


# --- asking a checkpoint


def questions() -> list[Prompt]:
    """The questions that ask a model who it is: half English, half Chinese."""
    asked = read(QUESTIONS)
    return [
        make_prompt("identity", language, question, "")
        for language, listed in asked.items()
        for question in listed
    ]


def score(config: IdentityConfig, prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, Any]:
    """Who a model says it is, from its summaries to `questions()`: shares of all answers, and by language.

    {"questions": 50, "other": 0.1, "own": 0.7, "names": {"ChatGPT": 4}, "by_language": {"en": {...}}}; "own":
    the answer says our name, and claims no other.
    """
    claims = Claims(config)

    def part(rows: Iterable[tuple[Prompt, str]]) -> dict[str, Any]:
        found = [(claims.found(text), config.name.lower() in text.lower()) for _, text in rows]
        names = Counter(name for claimed, _ in found for name in dict.fromkeys(claimed))
        count = max(1, len(found))
        return {
            "questions": len(found),
            "other": sum(bool(claimed) for claimed, _ in found) / count,
            "own": sum(is_named and not claimed for claimed, is_named in found) / count,
            "names": dict(names.most_common()),
        }

    rows = list(zip(prompts, answers, strict=True))
    languages: Mapping[str, list[tuple[Prompt, str]]] = {
        language: [row for row in rows if row[0].language == language]
        for language in dict.fromkeys(prompt.language for prompt in prompts)
    }
    return part(rows) | {"by_language": {language: part(some) for language, some in languages.items()}}
