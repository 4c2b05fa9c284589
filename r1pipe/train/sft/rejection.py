"""Rejection sampling (R1 section 2.3.3): draw, score, filter, join with general data.

Samples are stored in shards, so that an interruption costs one shard. The rows of samples.parquet have the
columns of r1pipe.runs.samples, which say where each came from.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1pipe.config import ParentRef, RejectionConfig
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Demonstration, Prompt, Score, Status
from r1pipe.data.overlap import user_text
from r1pipe.data.screening import Screening
from r1pipe.data.source import draw_prompts_that_fit
from r1pipe.rewards import Verdicts, score_all
from r1pipe.runs import samples, stopping
from r1pipe.runs.checkpoints import broken, file_hash, verify
from r1pipe.runs.files import write_json
from r1pipe.runs.record import record_of
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import held_out
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.sampler import Progress
from r1pipe.train.run import Run, log
from r1pipe.train.sft.filters import FILTERS, Sampled, apply_filters
from r1pipe.train.sft.judged import JUDGED_FILTERS, Approved
from r1pipe.train.shards import SHARD_ROUNDS, in_order, in_shards

# Works of sampling: their shards and their random streams have these names.
REASONING, GENERAL = "sampling", "sampling general prompts"
GENERAL_ALONE = "no sample was kept: training on general data alone"


def draw_samples(
    run: Run[RejectionConfig], ranks: Ranks, prompts: Sequence[Prompt], name: str = REASONING
) -> list[Path]:
    """All shard files of the work `name`, in order, drawn from the sampler's weights, with a random stream of
    its own. The ranks share the work of drawing and scoring missing ones."""
    stage = run.stage
    per_shard = max(1, SHARD_ROUNDS * stage.sampling.max_num_seqs // stage.samples_per_prompt)

    def draw(part: Sequence[Prompt], number: int, count: int, progress: Progress) -> pa.Table:
        return pa.Table.from_pylist(_draw(run, part, run.seed(name), (number, count), progress))

    def idle() -> None:
        run.sampler.generate([], SamplingParams(stage.sampling.max_tokens), stop=stopping.requested)

    return in_shards(run, ranks, name, prompts, per_shard, draw, idle, each=stage.samples_per_prompt)


def _draw(
    run: Run[RejectionConfig],
    prompts: Sequence[Prompt],
    seed: int,
    shard: tuple[int, int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of one shard (number, count): completions and their rule scores, enough for the filters."""
    sampling, each, (number, count) = run.stage.sampling, run.stage.samples_per_prompt, shard
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        n=each,
        seed=seed,
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
            **samples.prompt_columns(prompt),
            "licence": prompt.licence,
            "checker": json.dumps(prompt.checker),
            "completion": completion.text,
            "tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "scores": json.dumps({name: asdict(score) for name, score in by_rule.items()}),
        }
        for prompt, completion, by_rule in zip(repeated, completions, scores, strict=True)
    ]


def evaluation_questions(run: Run[Any], context: int) -> list[str]:
    """All reasoning questions of this pipeline's evaluations, so that none is trained on."""
    final = run.stage.eval
    asked = [held_out(run, context, config) for config in (final, evaluate.short(final))]
    return [user_text(prompt) for each in asked for prompt in (*each.reasoning, *each.harder)]


def drawn_in_order(shards: Sequence[Path], each: int) -> list[Sampled]:
    """All samples in the order of the prompts, `each` per prompt, for any number of shards and ranks."""
    drawn = []
    for rows in in_order(shards, each):
        for row in rows:
            checker, licence = json.loads(row["checker"]), row.get("licence")
            prompt = replace(samples.prompt_of(row), checker=checker, licence=licence)
            scores = {
                name: Score(score["value"], Status(score["status"]), score["detail"])
                for name, score in json.loads(row["scores"]).items()
            }
            completion = Completion([], [], row["finish_reason"], row["completion"])
            drawn.append(Sampled(prompt, completion, scores))
    return drawn


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
    screening = Screening(run.config.screening)
    sampled = screening.demonstrations(_sampled(run, sampler, kept))
    if screening.dropped:
        steps.append({"name": "screening", "kept": len(sampled), "dropped": screening.dropped})
    for step in steps:
        log.info("filter %s: %d kept, %d dropped", step["name"], step["kept"], step["dropped"])
    skipped = f", {too_long} prompts passed over as too long" if too_long else ""
    funnel = [{"name": f"drawn{skipped}", "kept": len(drawn), "dropped": 0}, *steps]
    wanted = (
        round(stage.general_ratio * len(sampled)) if sampled else ceil(stage.general_ratio * stage.prompts)
    )
    seed = run.seed("general traces")
    judged: list[Demonstration] = []
    if general:
        approved = _sampled(run, sampler, general.samples[:wanted], GENERAL, JUDGED_FILTERS, general.judge)
        judged = screening.demonstrations(approved)
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
    if not sampled:
        funnel.append({"name": GENERAL_ALONE, "kept": 0, "dropped": 0})
    write_json(run.folder.data / "funnel.json", funnel)
    if not sampled and not written and not judged:
        worst = max(funnel, key=lambda step: step["dropped"])
        raise DataError(
            f"nothing to train on: the filters left none of {len(drawn)} samples "
            f"({worst['dropped']} dropped by '{worst['name']}'; see {run.folder.data / 'funnel.json'}), and "
            f"data={run.config.data.name} has no general demonstrations that fit a row; train the sampled "
            "checkpoint longer, or choose data with instructions and stage.general_ratio above 0"
        )
    if not sampled:
        run.progress(GENERAL_ALONE, len(written), len(written), "traces")
        log.info("%s", GENERAL_ALONE)
    rows = [samples.row_of(one, samples.kind_of(one.prompt)) for one in (*sampled, *judged, *written)]
    samples.write(path, rows)
    return path


def _sampled(
    run: Run[RejectionConfig],
    sampler: ParentRef,
    kept: Sequence[Sampled],
    name: str = REASONING,
    filters: tuple[str, ...] = FILTERS,
    judge: str | None = None,
) -> list[Demonstration]:
    """What the filters kept of the work `name`, with where it came from."""
    seed = str(run.seed(name))
    return [
        Demonstration(
            sample.prompt,
            sample.completion.text,
            source=samples.SAMPLED + sampler.run_id,
            checkpoint_hash=sampler.hash,
            seed=seed,
            licence=sample.prompt.licence,
            judge=judge,
            filters=filters,
        )
        for sample in kept
    ]


def read_dataset(path: Path) -> tuple[list[Demonstration], str]:
    """The demonstrations in samples.parquet, and the hash of the file."""
    return [samples.demonstration_of(row) for row in samples.read(path)], file_hash(path)


def samples_of(parent: ParentRef) -> tuple[list[Demonstration], str]:
    """The demonstrations that a finished rejection sampling trained on, and their file's hash. Raises
    CheckpointError as dataset_of does."""
    return read_dataset(dataset_of(parent)[0])


def dataset_of(parent: ParentRef) -> tuple[Path, str]:
    """The file that a finished run's samples are in, and its hash. Raises CheckpointError if it or the run's
    checkpoint is missing or changed."""
    verify(parent.checkpoint, parent.hash)
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    expected = record_of(run).get("data_hash") or ""
    problem = broken(run.dataset, expected)
    if problem:
        raise CheckpointError(
            f"{problem}; copy it back, run `r1pipe run stage=rejection_sft` again, or name a stage that "
            "samples in stage.reads"
        )
    return run.dataset, expected
