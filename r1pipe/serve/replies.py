"""OpenAI's replies: an object with all answers, or chunks while they are drawn."""

import math
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from r1pipe.chat.stream import AnswerText, Piece
from r1pipe.chat.template import Chat
from r1pipe.serve.protocol import Asked
from r1pipe.serve.request import Alternatives, News, PromptRead

OBJECTS = {"chat": ("chat.completion", "chatcmpl"), "completion": ("text_completion", "cmpl")}


@dataclass
class _Choice:
    """One answer, as far as it has come."""

    text: AnswerText
    piece: Piece = field(default_factory=Piece)  # all that has been told
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    finish_reason: str | None = None


class Reply:
    """The reply to one request; `left` is how much is still to come."""

    def __init__(self, asked: Asked, chat: Chat, model: str):
        self.asked, self.chat, self.model = asked, chat, model
        self.left = asked.request.left()
        self.created = int(time.time())
        self.object, prefix = OBJECTS[asked.kind]
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.prompts_read: dict[int, PromptRead] = {}
        in_chat = asked.kind == "chat"
        texts = [AnswerText(chat, asked.stop, in_chat) for _ in range(asked.request.answers)]
        self.choices = [_Choice(text) for text in texts]

    def take(self, news: News | PromptRead) -> dict[str, Any] | None:
        """Take in what is new; the chunk that tells it, if a stream has something to tell."""
        if isinstance(news, PromptRead):
            self.prompts_read[news.prompt] = news
            self.left -= 1
            return None
        choice = self.choices[news.answer]
        if choice.finish_reason:  # the engine has not yet heard that a stop string was met
            return None
        piece = choice.text.feed(news.tokens, news.finish_reason is not None)
        choice.piece += piece
        first = len(choice.tokens)
        choice.tokens += news.tokens
        choice.logprobs += news.logprobs
        choice.alternatives += news.alternatives
        choice.finish_reason = "stop" if choice.text.stopped else news.finish_reason
        self.left -= choice.finish_reason is not None
        if not (piece.reasoning or piece.content or news.logprobs or choice.finish_reason):
            return None
        return self._chunk(news.answer, piece, first)

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a streamed chat begins with."""
        if self.asked.kind != "chat":
            return []
        role = {"role": "assistant", "content": ""}
        chunks = [{"index": i, "delta": role, "finish_reason": None} for i in range(len(self.choices))]
        return [self._object([chunk], chunk=True) for chunk in chunks]

    def last_chunks(self) -> list[dict[str, Any]]:
        if not self.asked.include_usage:
            return []
        return [self._object([], chunk=True) | {"usage": self.usage()}]

    def whole(self) -> dict[str, Any]:
        """The reply once nothing is left."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return self._object(choices, chunk=False) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        read = sum(map(len, self.asked.request.prompts))
        drawn = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

    def _object(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = f"{self.object}.chunk" if chunk and self.asked.kind == "chat" else self.object
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def _chunk(self, index: int, piece: Piece, first: int) -> dict[str, Any]:
        choice = self.choices[index]
        told: dict[str, Any] = {}
        logprobs = self._logprobs(choice.tokens[first:], choice.logprobs[first:], choice.alternatives[first:])
        if self.asked.kind == "chat":
            told["delta"] = {
                **({"reasoning_content": piece.reasoning} if piece.reasoning else {}),
                **({"content": piece.content} if piece.content else {}),
            }
        else:
            told["text"] = piece.content
        parts = {"index": index, **told, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return self._object([parts], chunk=True)

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        tokens, logprobs, alternatives = choice.tokens, choice.logprobs, choice.alternatives
        reason = choice.finish_reason or "length"
        if self.asked.kind == "chat":
            told = self._logprobs(tokens, logprobs, alternatives)
            message = {"role": "assistant", "content": choice.piece.content}
            if choice.piece.reasoning:
                message["reasoning_content"] = choice.piece.reasoning
            return {"index": index, "message": message, "logprobs": told, "finish_reason": reason}
        text = choice.piece.content
        if self.asked.echo:
            prompt = index // self.asked.request.params.n
            before = self.asked.request.prompts[prompt]
            text = self.chat.tokenizer.decode(before, skip_special_tokens=False) + text
            if prompt in self.prompts_read:
                found = self.prompts_read[prompt].likelihood
                tokens = before + tokens
                logprobs = [None, *found.logprobs_T.tolist(), *logprobs]
                tops = zip(found.top_tokens_Tk.tolist(), found.top_logprobs_Tk.tolist(), strict=True)
                alternatives = [([], []), *tops, *alternatives]
        told = self._logprobs(tokens, logprobs, alternatives)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def _logprobs(
        self, tokens: list[int], logprobs: list[float | None], alternatives: list[Alternatives]
    ) -> dict[str, Any] | None:
        if self.asked.request.top is None:
            return None
        texts = [self._token(token) for token in tokens]
        values = [_finite(logprob) for logprob in logprobs]
        if self.asked.kind == "chat":
            content = [
                {
                    **_entry(text, value),
                    "top_logprobs": [
                        _entry(self._token(other), _finite(logprob))
                        for other, logprob in zip(*tops, strict=True)
                    ],
                }
                for text, value, tops in zip(texts, values, alternatives, strict=True)
            ]
            return {"content": content}
        tops_by_text = [
            None if value is None else self._by_text(text, value, tops)
            for text, value, tops in zip(texts, values, alternatives, strict=True)
        ]
        offsets, at = [], 0
        for text in texts:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": tops_by_text,
            "text_offset": offsets,
        }

    def _by_text(self, text: str, logprob: float, tops: Alternatives) -> dict[str, float | None]:
        """The alternatives with the token itself; of two with the same text, the likelier."""
        named: dict[str, float | None] = {}
        for token, value in zip(*tops, strict=True):
            named.setdefault(self._token(token), _finite(value))
        named.setdefault(text, logprob)
        return named

    def _token(self, token: int) -> str:
        if self.asked.tokens_as_ids:
            return f"token_id:{token}"
        return self.chat.tokenizer.decode([token], skip_special_tokens=False)


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(value: float | None) -> float | None:
    """As JSON has it: no infinities."""
    return value if value is not None and math.isfinite(value) else None
