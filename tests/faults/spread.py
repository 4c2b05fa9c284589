"""A run that goes on with another number of ranks or at another ZeRO level, through DeepSpeed's universal
checkpoint: the same prompts and completions, and every metric as without the change but for rounding."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rl_runs import metrics_of

from faults.attempts import interrupted
from faults.forks import run_job
from faults.lab import POINTS, Lab, Shape
from faults.outcome import Outcome
from faults.same import apart, equal
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object

MOVES = [  # (ranks, ZeRO level) before and after, and the checkpoint that is gone on from; 0: anew
    ((1, 1), (2, 2), 2),
    ((2, 2), (1, 0), 2),
    ((2, 3), (1, 1), 2),
    ((1, 0), (2, 3), 2),
    ((2, 1), (2, 3), 2),
    ((1, 1), (2, 1), 0),
]
WORDS = (
    *("stage.keep=9", "stage.eval.problems=6", "stage.eval.samples=2", "stage.eval.shown=6"),
    "stage.router.balance_alpha=1",  # a part of the loss that is worth seeing
)
KINDS = {  # what reinforcement has besides, in every step of the loop
    "PPO": ("grpo", ("stage.algorithm=ppo",)),
    "DAPO": (
        "grpo",
        ("stage.loss=dapo", "stage.max_sampling_batches=3", "stage.rewards.truncation_penalty=0"),
    ),
}
CASES = {stage: (stage, ()) for stage in POINTS} | KINDS
RELATIVE, ABSOLUTE = 1e-4, 1e-6  # what sums in another order, and AdamW after them, may make of it


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each stage and for PPO and DAPO. The short form is a move of some."""
    lab = Lab(folder)
    chosen = {"DAPO": MOVES[:1], "PPO": MOVES[1:2], "rejection_sft": MOVES[-1:], "reward_model": MOVES[:1]}
    for name, moves in chosen.items() if short else dict.fromkeys(CASES, MOVES).items():
        lost = [moved(lab, *CASES[name], *move) for move in moves]
        held = lost.count([])
        told = next((found[0] for found in lost if found), "the same numbers but for rounding")
        yield Outcome(f"{name} goes on with other ranks or ZeRO", len(moves), held, told)


def moved(
    lab: Lab,
    stage: str,
    words: tuple[str, ...],
    before: tuple[int, int],
    after: tuple[int, int],
    step: int,
) -> list[str]:
    """What differs, beyond rounding, from the run that was not moved."""
    old, new = (Shape(stage, *where, (*WORDS, *words)) for where in (before, after))
    whole = lab.reference(old).folder
    lab.tried += 1
    folder = lab.folder / f"{stage}-{lab.tried}-moved"
    if step:
        run = interrupted(folder, whole, step)
        assert checkpoints.steps(run.checkpoints)[-1] == step
        config = json.loads(run.config.read_text())
        config["engine"] |= {"ranks": new.ranks, "zero_level": new.zero_level}
        run.config.write_text(json.dumps(config))
    else:
        run = RunFolder(lab.prepared(folder, new))
    run_job(stage, folder, new.ranks)
    return [f"{old} to {new}, step {step}: {line}" for line in differences(run, RunFolder(whole))]


def differences(run: RunFolder, whole: RunFolder) -> Iterator[str]:
    yield from apart(metrics_of(run.path), metrics_of(whole.path), "metrics.jsonl", near)
    yield from apart(read_object(run.evaluation), read_object(whole.evaluation), "evaluation.json", near)
    for table in sorted(whole.rollouts.glob("*.parquet")):
        if drawn(run.rollouts / table.name) != drawn(table):
            yield f"{table.name}: other completions"
    if whole.dataset.exists() and not pq.read_table(run.dataset).equals(pq.read_table(whole.dataset)):
        yield f"{whole.dataset.name}: other samples, or in another order"
    if json.loads(run.samples.read_text()) != json.loads(whole.samples.read_text()):
        yield "samples.json: other completions"


def near(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) if isinstance(a, float) else equal(a, b)


def drawn(table: Path) -> list[dict[str, Any]]:
    """Prompts and completions in their order, as the loop writes them whatever the ranks."""
    return pq.read_table(table, columns=["prompt_id", "completion"]).to_pylist()
