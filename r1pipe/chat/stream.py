"""The text of an answer while its tokens come: characters that are whole, up to a stop string, thought apart.

What the pieces say together does not depend on how the tokens came.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1pipe.chat.template import Chat
from r1pipe.chat.tokens import END_THINK, THINK

UNFINISHED = "\ufffd"  # how the first bytes of a character are decoded


@dataclass
class Piece:
    """More of an answer's text."""

    reasoning: str = ""
    content: str = ""

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.reasoning + other.reasoning, self.content + other.content)


class TokenText:
    """The text of tokens as Chat.decode writes it, as far as its characters are whole."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.tokens: list[int] = []
        self._context = self._done = (
            0  # sent is what lies before `done`, read with the tokens from `context` on
        )

    def feed(self, tokens: Sequence[int], last: bool) -> str:
        """What `tokens` add; `last`: none will follow."""
        self.tokens += tokens
        before = self.chat.decode(self.tokens[self._context : self._done])
        text = self.chat.decode(self.tokens[self._context :])
        if text.endswith(UNFINISHED) and not last:
            return ""
        self._context, self._done = self._done, len(self.tokens)
        return text[len(before) :]


@dataclass
class StopStrings:
    """Ends a text before the first of some strings."""

    strings: Sequence[str]
    found: bool = False
    _held: str = ""  # may be the beginning of one

    def feed(self, text: str, last: bool) -> str:
        """As much as surely lies before a stop string."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        if places:
            self.found = True
            return text[: min(places)]
        keep = 0 if last else max((begun(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@dataclass
class ThoughtApart:
    """Tells the thought from what follows it: what a text opens with, from <think> to </think> or its end."""

    _part: str = "start"  # then "reasoning", "rest" and "content", or "content" alone
    _held: str = ""
    _sent: bool = False  # some of the thought has been

    def feed(self, text: str, last: bool) -> Piece:
        """What is surely the one or the other."""
        self._held += text
        piece = Piece()
        if self._part == "start":
            self._open(last)
        if self._part == "reasoning":
            piece.reasoning = self._thought(last)
        if self._part == "rest":  # the space between thought and answer
            self._held = self._held.lstrip()
            if self._held:
                self._part = "content"
        if self._part == "content":
            piece.content, self._held = self._held, ""
        return piece

    def _open(self, last: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._part, self._held = "reasoning", text.removeprefix(THINK)
        elif last or not THINK.startswith(text):
            self._part = "content"

    def _thought(self, last: bool) -> str:
        """What of the thought can be sent: without the spaces around it, and without half a tag."""
        if not self._sent:
            self._held = self._held.lstrip()
        before, tag, after = self._held.partition(END_THINK)
        if tag:
            self._part, self._held = "rest", after
            return before.rstrip()
        sure = before if last else before[: len(before) - begun(before, END_THINK)]
        sent = sure.rstrip()
        self._sent = self._sent or bool(sent)
        self._held = before[len(sent) :]
        return sent


def begun(text: str, string: str) -> int:
    """How many last characters of `text` may be the beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


class AnswerText:
    """An answer as its reader gets it."""

    def __init__(self, chat: Chat, stop: Sequence[str], thought_apart: bool):
        """`thought_apart`: as the answer of a chat, with the <think> that the template has opened."""
        self._text, self._stop = TokenText(chat), StopStrings(stop)
        self._thought = ThoughtApart() if thought_apart else None
        if self._thought:
            self._thought.feed(chat.opened, False)

    @property
    def stopped(self) -> bool:
        """Whether it has met a stop string: what follows is not read."""
        return self._stop.found

    def feed(self, tokens: Sequence[int], last: bool) -> Piece:
        """What `tokens` add to it; `last`: none will follow."""
        text = self._stop.feed(self._text.feed(tokens, last), last)
        last = last or self._stop.found
        return self._thought.feed(text, last) if self._thought else Piece(content=text)
