"""Rejection sampling (R1 section 2.3.3): draw, score, filter, join with general data.

Samples are stored in shards, so that an interruption costs one shard. Each row of samples.parquet has its
provenance: {"kind": "reasoning", "prompt_id": "word-1f…",
"task": "word", "language": "en", "level": 2, "question": "…", "answer": "42", "response": "<think>\\n…",
"source": "sampled:RUN ID", "checkpoint_hash": "9a…"}; and where any prompt has a context,
"context": '[{"role": "system", "content": "…"}]' or null.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain, zip_longest
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.config import ParentRef, RejectionConfig
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Demonstration, Message, Prompt, Score, Status
from r1pipe.data.overlap import asked
from r1pipe.data.source import draw_prompts_that_fit
from r1pipe.rewards import Verdicts, score_all
from r1pipe.runs import stopping
from r1pipe.runs.checkpoints import broken, file_hash, verify
from r1pipe.runs.files import replacing, write_json
from r1pipe.runs.record import record_of
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import held_out
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run, log
from r1pipe.train.sft.filters import Sampled, apply_filters
from r1pipe.train.sft.judged import Approved

SHARD_ROUNDS = 8  # completions per slot in one shard: few to lose, yet enough to keep the slots full
GENERAL_ALONE = "no sample was kept: training on general data alone"


def draw_samples(
    run: Run[RejectionConfig], ranks: Ranks, prompts: Sequence[Prompt], name: str = "shards"
) -> list[Path]:
    """All shard files of the folder `name`, in order, drawn from the sampler's weights. The ranks share the
    work of drawing and scoring missing ones."""
    stage = run.stage
    folder = run.folder.data / name
    folder.mkdir(exist_ok=True)
    per_shard = max(1, SHARD_ROUNDS * stage.sampling.max_num_seqs // stage.samples_per_prompt)
    # an interrupted run, maybe with other ranks, has fixed what belongs to which shard
    counts = [int(path.stem.rpartition("-of-")[2]) for path in folder.glob("*-of-*.parquet")]
    per_rank = -(-len(prompts) // (per_shard * ranks.world_size))
    count = max(counts, default=per_rank * ranks.world_size)
    shards = [folder / f"{number + 1}-of-{count}.parquet" for number in range(count)]
    total = len(prompts) * stage.samples_per_prompt
    missing = [n for n in range(ranks.rank, count, ranks.world_size) if not shards[n].exists()]
    idle = ranks.agree_max(len(missing)) - len(missing)
    with stopping.leaving_early(ranks):
        for number in missing:
            before = total * (number - ranks.rank) // count

            def progress(done: int, _: int, before: int = before) -> None:
                run.progress("sampling", before + done * ranks.world_size, total, "completions")

            rows = _draw(run, prompts[number::count], (number, count), progress)
            run.launch.check()
            _write_rows(shards[number], rows)
        for _ in range(idle):  # all ranks call the sampler equally often
            run.sampler.generate([], SamplingParams(stage.sampling.max_tokens), stop=stopping.requested)
    return shards


def _draw(
    run: Run[RejectionConfig],
    prompts: Sequence[Prompt],
    shard: tuple[int, int],
    progress: Any,
) -> list[dict[str, Any]]:
    """Rows of one shard (number, count): completions and their rule scores, enough for the filters."""
    sampling, each, (number, count) = run.stage.sampling, run.stage.samples_per_prompt, shard
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        n=each,
        seed=run.seed("sampling"),
        first=number,
        stride=count,
        max_num_seqs=sampling.max_num_seqs,
    )
    repeated = [prompt for prompt in prompts for _ in range(each)]
    tokens = [run.chat.prompt_tokens(prompt) for prompt in prompts]
    with Verdicts() as verdicts:
        ended = verdicts.on_completion(run.chat, prompts)
        completions = run.sampler.generate(tokens, params, progress, ended, stop=stopping.requested)
        scores = score_all(repeated, completions, ["accuracy", "format", "language"], verdicts)
    return [
        {
            **_prompt_row(prompt),
            "checker": json.dumps(prompt.checker),
            "completion": completion.text,
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "scores": json.dumps({name: asdict(score) for name, score in by_rule.items()}),
        }
        for prompt, completion, by_rule in zip(repeated, completions, scores, strict=True)
    ]


def evaluation_questions(run: Run[RejectionConfig], context: int) -> list[str]:
    """All questions of this pipeline's evaluations, so that none is trained on."""
    final = run.stage.eval
    return [
        asked(prompt)
        for config in (final, evaluate.short(final))
        for prompt in held_out(run, context, config)[0]
    ]


def drawn_in_order(shards: Sequence[Path], each: int) -> list[Sampled]:
    """All samples in the order of the prompts, `each` per prompt, for any number of shards and ranks."""
    tables = [pq.read_table(shard).to_pylist() for shard in shards]
    by_prompt = [[rows[i : i + each] for i in range(0, len(rows), each)] for rows in tables]
    samples = []
    for turn in zip_longest(*by_prompt, fillvalue=[]):  # shard `number` has prompts[number::count]
        for row in chain.from_iterable(turn):
            prompt = replace(_prompt_of(row), checker=json.loads(row["checker"]), level=row["level"])
            scores = {
                name: Score(score["value"], Status(score["status"]), score["detail"])
                for name, score in json.loads(row["scores"]).items()
            }
            completion = Completion([], [], row["finish_reason"], row["completion"])
            samples.append(Sampled(prompt, completion, scores))
    return samples


def build_dataset(
    run: Run[RejectionConfig],
    sampler: ParentRef,
    shards: Sequence[Path],
    questions: Sequence[str],
    too_long: int,
    general: Approved | None = None,
) -> Path:
    """Write data/samples.parquet (kept samples, then general demonstrations), if missing, and funnel.json.

    `too_long`: how many prompts were skipped; `general`: samples that a judge approves of, which take the
    place of written ones. If no sample was kept, the general part is trained on alone, as
    large as for one sample per prompt. Raises DataError if there is neither.
    """
    path, stage = run.folder.dataset, run.stage
    if path.exists():
        return path
    drawn = drawn_in_order(shards, stage.samples_per_prompt)
    kept, steps = apply_filters(drawn, stage.filters, questions)
    for step in steps:
        log.info("filter %s: %d kept, %d dropped", step["name"], step["kept"], step["dropped"])
    skipped = f", {too_long} prompts passed over as too long" if too_long else ""
    funnel = [{"name": f"drawn{skipped}", "kept": len(drawn), "dropped": 0}, *steps]
    wanted = round(stage.general_ratio * len(kept)) if kept else ceil(stage.general_ratio * stage.prompts)
    seed = run.seed("general traces")
    judged = general.samples[:wanted] if general else []
    if general:
        funnel += general.funnel
    written, longer = draw_prompts_that_fit(
        lambda n: run.data.general_demonstrations(n, seed, stage.general_kinds),
        wanted - len(judged),
        lambda row: len(run.chat.example(row.prompt, row.response).tokens) <= stage.sequence_length,
    )
    log.info(
        "%d of %d general demonstrations, %d more are too long; %d judged samples beside them",
        *(len(written), wanted - len(judged), longer, len(judged)),
    )
    if not kept:
        funnel.append({"name": GENERAL_ALONE, "kept": 0, "dropped": 0})
    write_json(run.folder.data / "funnel.json", funnel)
    if not kept and not written and not judged:
        worst = max(funnel, key=lambda step: step["dropped"])
        raise DataError(
            f"nothing to train on: the filters left none of {len(drawn)} samples "
            f"({worst['dropped']} dropped by '{worst['name']}'; see {run.folder.data / 'funnel.json'}), and "
            f"data={run.config.data.name} has no general demonstrations that fit a row; train the sampled "
            "checkpoint longer, or choose data with instructions and stage.general_ratio above 0"
        )
    if not kept:
        run.progress(GENERAL_ALONE, len(written), len(written), "traces")
        log.info("%s", GENERAL_ALONE)
    rows = (
        [
            {"kind": "reasoning", **_prompt_row(sample.prompt), "response": sample.completion.text}
            | {"source": f"sampled:{sampler.run_id}", "checkpoint_hash": sampler.hash}
            for sample in kept
        ]
        + [
            {"kind": "general", **_prompt_row(sample.prompt), "response": sample.completion.text}
            | {"source": f"sampled:{sampler.run_id}", "checkpoint_hash": sampler.hash}
            | {"judge": general.judge if general else None}
            for sample in judged
        ]
        + [
            {"kind": "general", **_prompt_row(demonstration.prompt), "response": demonstration.response}
            | {"source": demonstration.source, "checkpoint_hash": None}
            for demonstration in written
        ]
    )
    _write_rows(path, rows)
    return path


def read_dataset(path: Path) -> tuple[list[Demonstration], str]:
    """The demonstrations in samples.parquet, and the hash of the file."""
    rows = pq.read_table(path).to_pylist()
    demonstrations = [Demonstration(_prompt_of(row), row["response"], source=row["source"]) for row in rows]
    return demonstrations, file_hash(path)


def samples_of(parent: ParentRef) -> tuple[list[Demonstration], str]:
    """The demonstrations that a finished rejection sampling trained on, and their file's hash. Raises
    CheckpointError if they or its checkpoint are missing or changed."""
    verify(parent.checkpoint, parent.hash)
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    problem = broken(run.dataset, record_of(run).get("data_hash") or "")
    if problem:
        raise CheckpointError(
            f"{problem}; copy it back, run `r1pipe run stage=rejection_sft` again, or name a stage that "
            "samples in stage.reads"
        )
    return read_dataset(run.dataset)


def _prompt_of(row: dict[str, Any]) -> Prompt:
    context = tuple(Message(**message) for message in json.loads(row.get("context") or "[]"))
    prompt = Prompt(row["prompt_id"], row["task"], row["language"], row["question"], row["answer"])
    return replace(prompt, context=context)


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    context = [asdict(message) for message in prompt.context]
    return {
        "prompt_id": prompt.id,
        "task": prompt.task,
        "language": prompt.language,
        "level": prompt.level,
        "question": prompt.question,
        "answer": prompt.answer,
        **({"context": json.dumps(context, ensure_ascii=False)} if context else {}),
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Atomic: a shard that exists is never drawn again. What a row lacks of another's columns is null."""
    columns: dict[str, None] = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([columns | row for row in rows])
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
