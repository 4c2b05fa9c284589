"""Rejection sampling (R1 section 2.3.3): draw, score, filter, join with general data.

What is drawn is kept in shards as it comes, so that an interruption costs one shard.

Each row of samples.parquet knows where it comes from: {"kind": "reasoning", "prompt_id": "word-1f…",
"task": "word", "language": "en", "level": 2, "question": "…", "answer": "42", "response": "<think>\\n…",
"source": "sampled:RUN ID", "checkpoint_hash": "9a…"}
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.chat.template import Chat
from r1pipe.config import ParentRef, RejectionConfig
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Demonstration, Prompt, Score, Status
from r1pipe.data.fitting import draw_prompts_that_fit
from r1pipe.data.source import Source
from r1pipe.rewards import Verdicts, score_all
from r1pipe.runs import stopping
from r1pipe.runs.checkpoints import broken, file_hash, verify
from r1pipe.runs.files import replacing, write_json
from r1pipe.runs.record import record_of
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import held_out
from r1pipe.train.rollout import Sampler, SamplingParams
from r1pipe.train.run import Run, log
from r1pipe.train.sft.filters import Sampled, apply_filters

SHARD_ROUNDS = 8  # completions per slot in one shard: few enough to lose, enough to keep the slots full
GENERAL_ALONE = "no sample was kept: training on general data alone"


def draw_samples(
    run: Run[RejectionConfig], ranks: Ranks, sampler: Sampler, chat: Chat, prompts: Sequence[Prompt]
) -> list[Path]:
    """Every shard's file, in order; those that are not there yet are drawn and scored, shared among ranks."""
    stage = run.stage
    folder = run.folder.data / "shards"
    folder.mkdir(exist_ok=True)
    per_shard = max(1, SHARD_ROUNDS * stage.sampling.max_num_seqs // stage.samples_per_prompt)
    count = shards_begun(folder) or shards_for(len(prompts), per_shard, ranks.world_size)
    shards = [folder / f"{number + 1}-of-{count}.parquet" for number in range(count)]
    total = len(prompts) * stage.samples_per_prompt
    with stopping.leaving_early(ranks):
        for number in range(ranks.rank, count, ranks.world_size):
            before = total * (number - ranks.rank) // count

            def progress(done: int, _: int, before: int = before) -> None:
                run.progress("sampling", before + done * ranks.world_size, total, "completions")

            if not shards[number].exists():
                samples = _draw(run, sampler, chat, prompts[number::count], (number, count), progress)
                _write_rows(shards[number], [_pack(sampled) for sampled in samples])
    return shards


def shards_for(prompts: int, per_shard: int, ranks: int) -> int:
    """As many for each rank."""
    return -(-prompts // (per_shard * ranks)) * ranks


def shards_begun(folder: Path) -> int:
    """Into how many shards an interrupted run has cut its prompts, maybe with other ranks; 0: none yet.

    What is a shard depends on this number, so the run keeps to it.
    """
    return max((int(path.stem.rpartition("-of-")[2]) for path in folder.glob("*-of-*.parquet")), default=0)


def _draw(
    run: Run[RejectionConfig],
    sampler: Sampler,
    chat: Chat,
    prompts: Sequence[Prompt],
    shard: tuple[int, int],
    progress: Any,
) -> list[Sampled]:
    """Completions of one shard's prompts, with their scores by rule; `shard`: its number, and of how many."""
    sampling, each, (number, count) = run.stage.sampling, run.stage.samples_per_prompt, shard
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        n=each,
        seed=run.seed("sampling"),
        first=number,
        stride=count,
    )
    asked = [prompt for prompt in prompts for _ in range(each)]
    tokens = [chat.prompt_tokens(prompt) for prompt in prompts]
    with Verdicts() as verdicts:
        completions = sampler.generate(tokens, params, progress, verdicts.ended(chat, prompts))
        scores = score_all(asked, completions, ["accuracy", "format", "language"], verdicts)
    return [Sampled(*sample) for sample in zip(asked, completions, scores, strict=True)]


def evaluation_questions(run: Run[RejectionConfig], chat: Chat, source: Source, context: int) -> list[str]:
    """All that this pipeline's models are measured on, so that none of it is trained on."""
    final = run.stage.eval
    return [
        prompt.question
        for config in (final, evaluate.short(final))
        for prompt in held_out(chat, source, context, config)[0]
    ]


def drawn_in_order(shards: Sequence[Path], each: int) -> list[Sampled]:
    """All samples in the order of the prompts, `each` of one, whatever the number of shards and of ranks."""
    tables = [pq.read_table(shard).to_pylist() for shard in shards]
    by_prompt = [[rows[i : i + each] for i in range(0, len(rows), each)] for rows in tables]
    turns = zip_longest(*by_prompt, fillvalue=[])  # as prompts[number::count] has shared them out
    return [_unpack(row) for turn in turns for rows in turn for row in rows]


def choose_samples(
    run: Run[RejectionConfig], shards: Sequence[Path], questions: Sequence[str], too_long: int
) -> tuple[list[Sampled], list[dict[str, Any]]]:
    """What the filters keep of all shards, maybe nothing, and the funnel with what was drawn in front.

    `questions`: those of the evaluation. `too_long`: prompts that were passed over.
    """
    drawn = drawn_in_order(shards, run.stage.samples_per_prompt)
    kept, funnel = apply_filters(drawn, run.stage.filters, questions)
    for step in funnel:
        log.info("filter %s: %d kept, %d dropped", step["name"], step["kept"], step["dropped"])
    passed_over = f", {too_long} prompts passed over as too long" if too_long else ""
    return kept, [{"name": f"drawn{passed_over}", "kept": len(drawn), "dropped": 0}, *funnel]


def build_dataset(
    run: Run[RejectionConfig],
    chat: Chat,
    source: Source,
    sampler: ParentRef,
    shards: Sequence[Path],
    questions: Sequence[str],
    too_long: int,
) -> Path:
    """Write data/samples.parquet, kept samples and general traces together, unless it is there already; the
    funnel goes to data/funnel.json.

    Where no sample was kept, the general part is trained on alone, as large as beside one sample a prompt.
    Raises DataError where there is none of either.
    """
    path = run.folder.dataset
    if path.exists():
        return path
    kept, funnel = choose_samples(run, shards, questions, too_long)
    ratio = run.stage.general_ratio
    wanted = round(ratio * len(kept)) if kept else ceil(ratio * run.stage.prompts)
    general = general_part(run, chat, source, wanted)
    if not kept:
        funnel.append({"name": GENERAL_ALONE, "kept": 0, "dropped": 0})
    write_json(run.folder.data / "funnel.json", funnel)
    if not kept and not general:
        raise DataError(nothing_to_train_on(run, funnel))
    if not kept:
        run.progress(GENERAL_ALONE, len(general), len(general), "traces")
        log.info("%s", GENERAL_ALONE)
    rows = [
        {"kind": "reasoning", **_prompt_row(sample.prompt), "response": sample.completion.text}
        | {"source": f"sampled:{sampler.run_id}", "checkpoint_hash": sampler.hash}
        for sample in kept
    ] + [
        {"kind": "general", **_prompt_row(trace.prompt), "response": trace.response}
        | {"source": trace.source, "checkpoint_hash": None}
        for trace in general
    ]
    _write_rows(path, rows)
    return path


def general_part(run: Run[RejectionConfig], chat: Chat, source: Source, wanted: int) -> list[Demonstration]:
    """Up to so many general traces; in the place of those that are too long for a row others are drawn."""
    stage, seed = run.stage, run.seed("general traces")
    general, too_long = draw_prompts_that_fit(
        lambda n: source.general_demonstrations(n, seed, stage.general_kinds),
        wanted,
        lambda trace: len(chat.example(trace.prompt, trace.response).tokens) <= stage.sequence_length,
    )
    log.info("%d general traces of %d wanted, %d more are too long", len(general), wanted, too_long)
    return general


def nothing_to_train_on(run: Run[RejectionConfig], funnel: Sequence[dict[str, Any]]) -> str:
    """One line on why: the filter that most samples fell to, and what could be done."""
    worst = max(funnel, key=lambda step: step["dropped"])
    return (
        f"nothing to train on: the filters left none of {funnel[0]['kept']} samples "
        f"({worst['dropped']} fell to '{worst['name']}'; see {run.folder.data / 'funnel.json'}), and "
        f"data={run.config.data.name} gives no general traces that fit a row; train the sampled checkpoint "
        "longer, or choose data with instructions and stage.general_ratio above 0"
    )


def read_dataset(path: Path) -> tuple[list[Demonstration], str]:
    """The traces of samples.parquet, and the hash of the file."""
    demonstrations = []
    for row in pq.read_table(path).to_pylist():
        prompt = Prompt(row["prompt_id"], row["task"], row["language"], row["question"], row["answer"])
        demonstrations.append(Demonstration(prompt, row["response"], source=row["source"]))
    return demonstrations, file_hash(path)


def samples_of(parent: ParentRef) -> tuple[list[Demonstration], str]:
    """The traces that a finished run of rejection sampling trained on, and the hash of their file.

    Raises CheckpointError where the run has none, or they or its checkpoint are not what they were.
    """
    verify(parent.checkpoint, parent.hash)
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    problem = broken(run.dataset, record_of(run).get("data_hash") or "")
    if problem:
        raise CheckpointError(
            f"{problem}; copy it back, make another with `r1pipe run stage=rejection_sft`, or name a stage "
            "that samples in stage.reads"
        )
    return read_dataset(run.dataset)


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "task": prompt.task,
        "language": prompt.language,
        "level": prompt.level,
        "question": prompt.question,
        "answer": prompt.answer,
    }


def _pack(sample: Sampled) -> dict[str, Any]:
    """A row of a shard: whole, so that the filters can run again without the model."""
    return {
        **_prompt_row(sample.prompt),
        "checker": json.dumps(sample.prompt.checker),
        "completion": sample.completion.text,
        "tokens": len(sample.completion.tokens),
        "finish_reason": sample.completion.finish_reason,
        "scores": json.dumps({name: asdict(score) for name, score in sample.scores.items()}),
    }


def _unpack(row: dict[str, Any]) -> Sampled:
    prompt = Prompt(
        row["prompt_id"],
        row["task"],
        row["language"],
        row["question"],
        row["answer"],
        json.loads(row["checker"]),
        row["level"],
    )
    scores = {
        name: Score(score["value"], Status(score["status"]), score["detail"])
        for name, score in json.loads(row["scores"]).items()
    }
    return Sampled(prompt, Completion([], [], row["finish_reason"], row["completion"]), scores)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all: a shard that exists is never drawn again."""
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
