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
import pyarrow.parquet as pq

from r1pipe.config import EvalConfig
from r1pipe.core.types import Completion, Prompt
from r1pipe.rewards import Verdicts
from r1pipe.runs.files import replacing
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run

Drawn = tuple[Sequence[int], list[Completion]]  # indices of prompts, and equally many completions of each
SHARD_ROUNDS = 8  # completions per slot in one shard: few to lose, yet enough to keep the slots full


@dataclass
class EvalSampler:
    """Draws for one evaluation. `context`: see `evaluate`; `folder`: where shards are kept, if anywhere."""

    run: Run[Any]
    ranks: Ranks
    config: EvalConfig
    verdicts: Verdicts
    stop: Callable[[], object]
    total: int  # completions of this rank in all
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
            self.run.progress("evaluating", before + count, self.total, "completions")

        tokens = [chat.prompt_tokens(prompt) for prompt in prompts]
        room = self.context
        limits = [min(params.max_tokens, room - len(each)) for each in tokens] if room else None
        ended = self.verdicts.on_completion(chat, prompts)
        return self.run.sampler.generate(tokens, params, progress, ended, limits, stop=self.stop)

    def _in_shards(self, folder: Path, pool: Sequence[Prompt], params: SamplingParams) -> Drawn:
        folder.mkdir(exist_ok=True)
        ranks, name = self.ranks, self._digest(pool, params)
        per_shard = max(1, SHARD_ROUNDS * params.max_num_seqs // params.n)
        per_rank = -(-len(pool) // (per_shard * ranks.world_size))
        # an interrupted run, maybe with other ranks, has fixed what belongs to which shard
        known = [int(path.stem.rpartition("-of-")[2]) for path in folder.glob(f"{name}-*.parquet")]
        count = max(ranks.all_gather_objects(max(known, default=per_rank * ranks.world_size)))
        indices: list[int] = []
        completions: list[Completion] = []
        missing = 0
        for number in range(ranks.rank, count, ranks.world_size):
            path, prompts = folder / f"{name}-{number + 1}-of-{count}.parquet", list(pool[number::count])
            if path.exists():
                found = _read(path)
                self.done += len(found)
            else:
                missing += 1
                found = self._generate(prompts, replace(params, first=number, stride=count))
                self.run.launch.check()
                _write(path, found)
            indices += range(number, len(pool), count)
            completions += found
        for _ in range(ranks.agree_max(missing) - missing):  # all ranks call the sampler equally often
            self._generate([], params)
        return indices, completions

    def _digest(self, pool: Sequence[Prompt], params: SamplingParams) -> str:
        """Of weights, prompts and sampling: other ones have other completions."""
        weights = self.run.config.weights_from
        asked = [(prompt.question, [asdict(turn) for turn in prompt.context]) for prompt in pool]
        drawn = asdict(replace(params, first=0, stride=1, max_num_seqs=1))
        content = json.dumps([weights and weights.hash, self.run.chat.template_hash, asked, drawn])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write(path: Path, completions: list[Completion]) -> None:
    rows = [{"text": c.text, "tokens": len(c.tokens), "finish_reason": c.finish_reason} for c in completions]
    schema = pa.schema([("text", pa.string()), ("tokens", pa.int64()), ("finish_reason", pa.string())])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")


def _read(path: Path) -> list[Completion]:
    """Completions whose tokens are counted, and not known."""
    return [
        Completion([0] * row["tokens"], [], row["finish_reason"], row["text"])
        for row in pq.read_table(path).to_pylist()
    ]
