"""The chat format: how a prompt is rendered, and how a response is parsed.

A conversation is BOS, the system prompt, USER, the question, ASSISTANT, the response, EOS; and a response
reads `<think>\\nreasoning\\n</think>\\n\\nsummary` (R1 section 2.3.1: a summary closes every response).
R1's template does not open `<think>`: the model must do so itself, and is rewarded for it. Where that of
another model does, `Chat.opened` is what it writes, and `Chat.response` the text that is rewarded.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from r1pipe.chat.tokens import ASSISTANT as ASSISTANT
from r1pipe.chat.tokens import BOS as BOS
from r1pipe.chat.tokens import END_THINK, SPECIAL_TOKENS, THINK, Special, ended_by, of_folder, of_r1
from r1pipe.chat.tokens import EOS as EOS
from r1pipe.chat.tokens import PAD as PAD
from r1pipe.chat.tokens import PLAIN_TOKENS as PLAIN_TOKENS
from r1pipe.chat.tokens import USER as USER
from r1pipe.core.chat_template import sha256, split_system, with_system
from r1pipe.core.errors import CheckpointError, ConfigError, DataError
from r1pipe.core.types import Example, Message, Prompt
from r1pipe.runs.files import read_object, write_json

SHOWN = 60  # characters of a message in an error
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# What else some tokenizers of transformers consist of; r1pipe carries it along.
MORE_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")

MARK = "r1pipe"  # an answer that no template writes itself
_RESPONSE = re.compile(r"\A<think>(?P<reasoning>.*?)</think>(?P<summary>.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """The parts of a response; one that is not well formed counts as summary throughout."""

    reasoning: str
    summary: str
    well_formed: bool


def parse(text: str) -> Parsed:
    """Split a response at its think tags.

    Well formed: it opens with <think>, closes it exactly once, and neither part is empty.
    """
    match = _RESPONSE.match(text)
    if not match:
        return Parsed("", text.split(END_THINK)[-1].strip(), False)
    reasoning, summary = match["reasoning"].strip(), match["summary"].strip()
    tidy = THINK not in reasoning + summary and END_THINK not in summary
    return Parsed(reasoning, summary, bool(tidy and reasoning and summary))


def compose_response(reasoning: str, summary: str) -> str:
    """The inverse of `parse`."""
    return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{summary}"


# What a template that is no use may raise, besides.
_BROKEN = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


class _RefusedMessage(jinja2.TemplateError):
    """What a template raises about the messages that it is given."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedMessage(message)


class Chat:
    """A tokenizer with its chat template, as it travels with every checkpoint."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: Special | None = None):
        """`template`: with its default system prompt, if it has one; see `core.chat_template`.

        `special`: None for R1's tokens.
        """
        self.tokenizer = tokenizer
        self.special = special or of_r1(tokenizer)
        self.source = with_system(template, None)
        # sandboxed: it may come from outside; transformers trims blocks so
        rules = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        rules.globals["raise_exception"] = _refuse  # as transformers calls it
        self.template = rules.from_string(self.source)
        if special and special.texts != SPECIAL_TOKENS:
            self.special = ended_by(special, tokenizer, self._after_answer())
        self.bos_id, self.eos_id, self.pad_id = self.special.bos_id, self.special.eos_id, self.special.pad_id
        self.eos_ids = self.special.eos_ids
        self.opened = self._opened()
        added = tokenizer.get_added_tokens_decoder().items()
        # think tags that decoding would drop with all other special tokens
        self._tags = {
            number: token.content
            for number, token in added
            if token.special and token.content in PLAIN_TOKENS
        }

    @classmethod
    def load(cls, folder: Path | str, system: str | None = None) -> "Chat":
        """Reads tokenizer.json and tokenizer_config.json; `system` is the system prompt of conversations that
        bring none ("": none; None: that of the template).

        Raises CheckpointError naming the wrong file, and ConfigError where the template cannot have `system`.
        """
        path, settings = (Path(folder) / name for name in TOKENIZER_FILES)
        for file in (path, settings):
            if not file.is_file():
                raise CheckpointError(
                    f"{file} is missing; a checkpoint carries its tokenizer and chat template"
                )
        template = read_object(settings).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(f"{settings} has no chat_template; export it again")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises a bare Exception
            raise CheckpointError(
                f"{path}: the tokenizer cannot be read ({error}); export it again"
            ) from None
        try:
            chat = cls(tokenizer, with_system(template, system), of_folder(Path(folder), tokenizer))
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"{settings}: the chat_template is not valid Jinja ({error}); export it again"
            ) from None
        if system:
            chat._check_system(system, settings)
        return chat

    def _check_system(self, system: str, settings: Path) -> None:
        special = [
            token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special
        ]
        for token in special:
            if token in system:
                raise ConfigError(f"chat.system has the text of the special token {token}; remove it")
        try:
            kept = system in self.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
        except DataError as error:
            raise ConfigError(f"chat.system cannot be used: {settings} refuses it ({error})") from None
        if not kept:
            raise ConfigError(
                f"chat.system cannot be used: the chat_template of {settings} leaves system messages out or "
                "changes them; correct that template, or drop chat.system"
            )

    def save(self, source: Path, target: Path) -> None:
        """Write the tokenizer files of the checkpoint `source` to `target`, with this template."""
        tokenizer, settings = TOKENIZER_FILES
        copyfile(source / tokenizer, target / tokenizer)
        for name in MORE_TOKENIZER_FILES:
            if (source / name).is_file():
                copyfile(source / name, target / name)
        content = read_object(source / settings) | {"chat_template": self.source}
        write_json(target / settings, content, indent=2)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def system(self) -> str:
        """The system prompt of conversations that bring none; "" for none."""
        return split_system(self.source)[1]

    @property
    def template_hash(self) -> str:
        return sha256(self.source)

    @property
    def tokenizer_hash(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The whole conversation as text, by the chat template.

        Raises DataError where the template refuses a message, and CheckpointError where it is broken.
        """
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.special.bos,
                eos_token=self.special.eos,
                tools=None,
                documents=None,
            )
        except _RefusedMessage as error:
            raise DataError(str(error)) from None
        except (jinja2.TemplateError, *_BROKEN) as error:
            raise CheckpointError(f"the chat template cannot be used ({error}); export it again") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added, special tokens in it are recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids up to and including the assistant token: what a sampler continues.

        Raises DataError where the template refuses a message of the prompt, or leaves its text out.
        """
        turns = [*prompt.context, Message("user", prompt.question)]
        messages = [{"role": turn.role, "content": self._escape(turn.content)} for turn in turns]
        text = self.render(messages, add_generation_prompt=True)
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":  # its reasoning may go
                content = content.split(END_THINK)[-1]
            if content.strip() not in text:
                raise DataError(
                    f"the chat template leaves out a message of {message['role']} "
                    f"({content.strip()[:SHOWN]!r}); take such messages out, or correct the template"
                )
        return self.encode(text)

    def example(self, prompt: Prompt, response: str) -> Example:
        """A training sequence whose loss covers the response and the end-of-sequence token.

        Answers in the prompt's context are read, not learned, and without their reasoning.
        """
        context = self.prompt_tokens(prompt)
        if self.opened:  # the prompt ends with the beginning of the thought
            thinks = response.startswith(THINK)
            response = response.removeprefix(THINK).lstrip() if thinks else f"{END_THINK}\n\n{response}"
        answer = [*self.encode(self._escape(response)), self.eos_id]
        return Example(context + answer, [False] * len(context) + [True] * len(answer))

    def decode(self, tokens: list[int]) -> str:
        """Text of sampled tokens, without special tokens; the think tags stay, special or not."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token in self._tags:
                parts += [[token], []]
            else:
                parts[-1].append(token)
        texts = [self.tokenizer.decode(part, skip_special_tokens=True) for part in parts[::2]]
        tags = [self._tags[token] for [token] in parts[1::2]]
        return "".join(text + tag for text, tag in zip(texts, [*tags, ""], strict=True))

    def response(self, tokens: list[int]) -> str:
        """Text of a sampled completion, with the `<think>` that the template has opened before it."""
        return self.opened + self.decode(tokens)

    def _escape(self, text: str) -> str:
        """A user's text cannot speak as the template: special tokens in it lose their bars, or get a space
        after their first character."""
        for token in self.special.texts:
            if token in text:
                harmless = token.replace("｜", "|")
                text = text.replace(token, harmless if harmless != token else f"{token[0]} {token[1:]}")
        return text

    def _after_answer(self) -> str:
        """What the template writes after an answer; "" where it cannot write a conversation."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            return self.render(turns, add_generation_prompt=False).rpartition(MARK)[2]
        except (CheckpointError, DataError):
            return ""

    def _opened(self) -> str:
        """The `<think>` and the space after it that the template writes before an answer, if it does."""
        try:
            text = self.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
        except (CheckpointError, DataError):
            return ""
        found = re.search(rf"{THINK}\s*\Z", text)
        return found[0] if found else ""
