"""The completions of an evaluation, which the ranks share out; kept in shards, so that none is drawn twice.

A shard has every count-th prompt. Its name has a digest of all that decides its content, so that a resumed
run takes what it finds, for any number of ranks.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1pipe.config import EvalConfig
from r1pipe.core.types import Completion, Prompt
from r1pipe.rewards import Verdicts
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run
from r1pipe.train.shards import SHARD_ROUNDS, fill, missing_of, planned, read_shard

Drawn = tuple[Sequence[int], list[Completion]]  # indices of prompts, and equally many completions of each


@dataclass
class EvalSampler:
    """Draws for one evaluation. `context`: see `evaluate`; `folder`: where shards are kept, if anywhere."""

    run: Run[Any]
    ranks: Ranks
    config: EvalConfig
    verdicts: Verdicts
    stop: Callable[[], object]
    total: int  # completions of all ranks
    context: int | None = None
    folder: Path | None = None
    done: int = 0

    def draw(self, pool: Sequence[Prompt], n: int, stream: int, temperature: float, top_p: float) -> Drawn:
        """n completions of each of this rank's prompts of `pool`; all ranks call."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        seed = random.Random(f"evaluate/{self.run.seed('evaluation')}/{stream}").getrandbits(31)
        params = SamplingParams(
            *(self.config.max_tokens, temperature, top_p, n, seed, rank, world_size),
            max_num_seqs=self.config.max_num_seqs,
        )
        if self.folder is None:
            indices = range(rank, len(pool), world_size)
            return indices, self._generate([pool[i] for i in indices], params)
        return self._in_shards(self.folder, pool, params)

    def _generate(self, prompts: list[Prompt], params: SamplingParams) -> list[Completion]:
        chat, before = self.run.chat, self.done
        self.done += len(prompts) * params.n

        def progress(count: int, _: int) -> None:
            self.run.shared_progress("evaluating", before + count, self.total, "completions")

        tokens = [chat.prompt_tokens(prompt) for prompt in prompts]
        room = self.context
        limits = [min(params.max_tokens, room - len(each)) for each in tokens] if room else None
        ended = self.verdicts.on_completion(chat, prompts)
        return self.run.sampler.generate(tokens, params, progress, ended, limits, stop=self.stop)

    def _in_shards(self, folder: Path, pool: Sequence[Prompt], params: SamplingParams) -> Drawn:
        ranks, prefix = self.ranks, f"{self._digest(pool, params)}-"
        per_shard = max(1, SHARD_ROUNDS * params.max_num_seqs // params.n)
        shards = planned(ranks, folder, prefix, len(pool), per_shard)
        count, drawn = len(shards), dict[int, list[Completion]]()

        def make(number: int) -> pa.Table:
            of_shard = replace(params, first=number, stride=count)
            drawn[number] = self._generate(list(pool[number::count]), of_shard)
            return _table(drawn[number])

        missing = missing_of(ranks, shards)
        mine = range(ranks.rank, count, ranks.world_size)
        self.done += sum(len(pool[number::count]) * params.n for number in mine if number not in missing)
        fill(self.run, missing, make)
        for _ in range(ranks.agree_max(len(missing)) - len(missing)):  # all call the sampler equally often
            self._generate([], params)
        indices = [i for number in mine for i in range(number, len(pool), count)]
        return indices, [one for number in mine for one in drawn.get(number) or _read(shards[number])]

    def _digest(self, pool: Sequence[Prompt], params: SamplingParams) -> str:
        """Of weights, prompts and sampling: other ones have other completions."""
        weights = self.run.config.weights_from
        asked = [(prompt.question, [asdict(turn) for turn in prompt.context]) for prompt in pool]
        drawn = asdict(replace(params, first=0, stride=1, max_num_seqs=1))
        content = json.dumps([weights and weights.hash, self.run.chat.template_hash, asked, drawn])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _table(completions: list[Completion]) -> pa.Table:
    rows = [{"text": c.text, "tokens": len(c.tokens), "finish_reason": c.finish_reason} for c in completions]
    schema = pa.schema([("text", pa.string()), ("tokens", pa.int64()), ("finish_reason", pa.string())])
    return pa.Table.from_pylist(rows, schema)


def _read(path: Path) -> list[Completion]:
    """Completions whose tokens are counted, and not known."""
    return [
        Completion([0] * row["tokens"], [], row["finish_reason"], row["text"]) for row in read_shard(path)
    ]
