"""A sampler like a server's, in the test's own process: it draws in threads, from a copy of the weights."""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from r1pipe.chat.template import Chat
from r1pipe.core.types import Completion
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher


@dataclass
class RemoteSampler:
    """`before` is called with what each `generate` is asked for, in its thread, and may wait or raise.

    A `generate` during which newer weights come reports the last token of each completion as theirs: what a
    server does that is paused with mode=keep.
    """

    remote: ClassVar[bool] = True
    chat: Chat
    before: Callable[[SamplingParams], object] = lambda params: None
    versions: list[int] = field(default_factory=list)  # of the updates
    model: object = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def update(self, weights, version: int) -> None:
        with weights.gathered() as model:
            drawn = copy.deepcopy(model).eval()
        with self.lock:
            self.model = drawn
            self.versions.append(version)

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress=None,
        ended=None,
        limits=None,
        stop: Callable[[], object] = lambda: False,
    ) -> list[Completion]:
        with self.lock:
            model, version = self.model, self.versions[-1]
        self.before(params)
        if stop():
            raise Stopped
        found = []
        for completion in Batcher(model, self.chat.eos_ids, self.chat.pad_id, stop=stop).generate(
            prompts, params, progress, ended, limits
        ):
            spans = [(len(completion.tokens), version)]
            if self.versions[-1] > version and len(completion.tokens) > 1:
                spans = [(len(completion.tokens) - 1, version), (1, self.versions[-1])]
            completion.versions = tuple(spans)
            found.append(completion)
        return found

    def close(self) -> None:
        self.closed = True
