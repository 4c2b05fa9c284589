"""A judge's answers on disk: what was asked once is neither asked nor paid for again.

One JSON object a line, in files of a folder that all ranks read and each writes one of:
{"key": "9f…", "texts": ["… [[A>B]]"]} for a prompt, and {"spent": {"requests": 8, …}} after each batch.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from r1pipe.chat.answerer import AnswerParams, Identity, Spent
from r1pipe.core.types import Prompt
from r1pipe.runs.answers import OF_JUDGES


def key_of(judge: Identity, prompt: Prompt, params: AnswerParams) -> str:
    """SHA-256 of who is asked what, and how."""
    context = [asdict(message) for message in prompt.context]
    asked = [judge.kind, judge.name, judge.version, context, prompt.question]
    how = [params.max_tokens, params.temperature, params.top_p, params.n, params.seed]
    return hashlib.sha256(json.dumps([*asked, *how]).encode()).hexdigest()


def stream_of(prompt: Prompt, seed: int) -> int:
    """The seed of a batch that begins with this prompt: batches share no random numbers, whichever rank or
    session asks, and however much of the work was in the cache."""
    context = [asdict(message) for message in prompt.context]
    asked = json.dumps([seed, context, prompt.question])
    return int(hashlib.sha256(asked.encode()).hexdigest()[:16], 16) >> 1


class AnswerCache:
    """What judges have answered in a run, of all its sessions and ranks."""

    def __init__(self, folder: Path, rank: int = 0):
        """Reads what is there; a line that a kill has cut off is left out, and asked again."""
        self.path = folder / OF_JUDGES.replace("*", str(rank))
        self.spent = Spent()  # by all ranks, before this session; and by this one since
        self._texts: dict[str, list[str]] = {}
        for path in sorted(folder.glob(OF_JUDGES)):
            for line in path.read_bytes().splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if "spent" in row:
            self.spent += Spent(**row["spent"])
        elif "key" in row:
            self._texts[row["key"]] = row["texts"]

    def get(self, key: str) -> list[str] | None:
        return self._texts.get(key)

    def put(self, answers: Sequence[tuple[str, list[str]]], spent: Spent) -> None:
        """Keep the answers of one batch, and what they have cost."""
        rows = [{"key": key, "texts": texts} for key, texts in answers]
        lines = [json.dumps(row) for row in [*rows, {"spent": asdict(spent)}]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_whole(file):
                lines.insert(0, "")
            file.write(("\n".join(lines) + "\n").encode())
        self._texts |= dict(answers)
        self.spent += spent


def _ends_whole(file: BinaryIO) -> bool:
    """Whether the last line is whole: a kill may have cut it off."""
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"
