"""Opens whoever answers besides the policy: a checkpoint on this machine, or a server."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from r1pipe.chat.answerer import Answerer, AnswerParams, Identity, Progress, Spent
from r1pipe.chat.server import ServerAnswerer
from r1pipe.chat.template import Chat
from r1pipe.config import AnswererConfig, ParentRef
from r1pipe.core.types import Completion, Prompt
from r1pipe.model import Policy, load_pretrained
from r1pipe.model.training import set_precision
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import ShardedWeights, load_for_rank
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.run import Run

CARD = "README.md"  # of a folder in Hugging Face's format


def open_answerer(
    run: Run[Any], ranks: Ranks, key: str, named: str | ParentRef, settings: AnswererConfig
) -> Answerer:
    """The server at a URL, or a checkpoint; `key` is what the user wrote it to. All ranks call.

    Raises EnvironmentProblem where no server answers, and CheckpointError for files that are not as recorded.
    """
    if isinstance(named, str):
        return ServerAnswerer(key, named, settings)
    return LocalAnswerer(run, ranks, named, settings)


class LocalAnswerer:
    """The Answerer that is a checkpoint, with the tokenizer, the template and the system prompt of its own.

    At ZeRO level 3 its weights are sharded, and all ranks must call `answer` equally often.
    """

    def __init__(self, run: Run[Any], ranks: Ranks, parent: ParentRef, settings: AnswererConfig):
        folder, engine = Path(parent.checkpoint), run.config.engine
        if ranks.rank == 0:
            checkpoints.verify(folder, parent.hash)
        self.chat = Chat.load(folder)
        with heartbeat.at("loading a teacher or judge", patient=True):
            model = load_for_rank(folder, engine) if engine.zero_level == 3 else load_pretrained(folder)
        set_precision(model, engine, ranks.device)
        model.eval().requires_grad_(False)
        whole = engine.zero_level < 3
        self._longest = model.config.max_position_embeddings
        self._sampler = BundledSampler(self.chat.eos_ids, self.chat.pad_id)
        self._sampler.update(WholeWeights(model.to(ranks.device)) if whole else ShardedWeights(model), 0)
        name = f"{parent.run_id}/{folder.name}" if parent.run_id else str(folder)
        licence = settings.licence or licence_in_card(folder)
        self.identity, self.spent = Identity("checkpoint", name, parent.hash, licence), Spent()

    def answer(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """As Answerer's. A prompt that leaves no room in the context gets empty answers that are truncated.
        Raises Stopped on a request to stop."""
        answers = self.continued([self.chat.prompt_tokens(prompt) for prompt in prompts], params, progress)
        for completion in chain.from_iterable(answers):
            completion.text = self.chat.response(completion.tokens) if completion.tokens else ""
        return answers

    def continued(
        self,
        tokens: Sequence[list[int]],
        params: AnswerParams,
        progress: Progress | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> list[list[Completion]]:
        """As `answer`, for prompts that are tokens, which need not end where an answer begins; `text` stays
        empty. `stop_ids`: tokens that end a completion besides the model's own."""
        began, n = time.monotonic(), params.n
        fit = [i for i, ids in enumerate(tokens) if len(ids) < self._longest]
        drawing = SamplingParams(
            params.max_tokens,
            params.temperature,
            params.top_p,
            n,
            params.seed,
            params.first,
            params.stride,
            stop_token_ids=stop_ids,
            max_num_seqs=params.max_num_seqs,
        )
        limits = [min(params.max_tokens, self._longest - len(tokens[i])) for i in fit]
        drawn = self._sampler.generate(
            [tokens[i] for i in fit], drawing, progress, limits=limits, stop=stopping.requested
        )
        answers = [[Completion([], [], "length") for _ in range(n)] for _ in tokens]
        for place, i in enumerate(fit):
            answers[i] = drawn[place * n : place * n + n]
        self.spent.requests += len(fit)
        self.spent.prompt_tokens += sum(len(tokens[i]) for i in fit)
        self.spent.completion_tokens += sum(len(completion.tokens) for completion in drawn)
        self.spent.seconds += time.monotonic() - began
        return answers

    @contextmanager
    def reading(self) -> Iterator[Policy]:
        """The whole model, to read tokens with; all ranks must enter where weights are sharded."""
        weights = self._sampler.weights
        assert weights is not None
        with weights.gathered() as model, torch.no_grad():
            model.eval()
            yield model

    def close(self) -> None:
        self._sampler.close()


def licence_in_card(folder: Path) -> str:
    """The licence that a model card in Hugging Face's format names; "" where there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front_matter = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    found = re.search(
        r"^license:[ \t]*['\"]?([\w.+-]+)", front_matter[1] if front_matter else "", re.MULTILINE
    )
    return found[1] if found else ""
