"""A loss or a gradient that is not finite: never saved; the step is skipped and counted, and past a limit the
job stops at its last good checkpoint, from which it goes on."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rl_runs import metrics_of
from safetensors.torch import load_file
from torch import Tensor, nn

from faults.attempts import STEPS, attempt, begin, first_lost, same_end, uninterrupted
from faults.outcome import Outcome
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.train.engine.engine import Engine

TRIES = 5
LAYER = "model.layers.1"  # where it begins


def loss_breaks(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs[0] * math.nan, *outputs[1:]


def gradient_breaks(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
    if outputs[0].requires_grad:
        outputs[0].register_hook(lambda gradient: gradient * math.inf)


BREAKS: dict[str, Callable[..., Any]] = {"loss": loss_breaks, "gradient": gradient_breaks}


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each stage and what breaks, once in a step and in all from a step on."""
    for stage in ("cold_start",) if short else ("cold_start", "grpo"):
        whole = uninterrupted(folder / stage / "whole", stage)
        for what, breaks in BREAKS.items():
            draw = random.Random(f"{seed}/{stage}/{what}")
            tries = 1 if short else TRIES
            steps = [draw.randrange(2, STEPS + 1) for _ in range(tries)]
            place = folder / stage / what
            lost = [once(place / f"once-{n}", stage, breaks, step) for n, step in enumerate(steps)]
            told = "skipped and counted; no checkpoint holds it"
            yield Outcome(
                f"{stage}: a {what} of one step not finite", tries, lost.count(""), first_lost(lost, told)
            )
            found = [on(place / f"on-{n}", whole, stage, breaks, step) for n, step in enumerate(steps)]
            lost = [problem for problem, _ in found]
            yield Outcome(
                f"{stage}: each {what} from a step on", tries, lost.count(""), first_lost(lost, found[-1][1])
            )


def broken(breaks: Callable[..., Any], first: int, last: float) -> Any:
    """The engine's steps, counted from 1, with a layer that breaks from the first to the last of them."""
    real, taken = Engine.train_step, [0]

    def train_step(engine: Engine, closures: Any) -> Any:
        taken[0] += 1
        if not first <= taken[0] <= last:
            return real(engine, closures)
        hook = engine.module.get_submodule(LAYER).register_forward_hook(breaks)
        try:
            return real(engine, closures)
        finally:
            hook.remove()

    return patch.object(Engine, "train_step", train_step)


def once(folder: Path, stage: str, breaks: Callable[..., Any], step: int) -> str:
    begin(folder, stage)
    with broken(breaks, step, step):
        code, line = attempt(folder)
    if code:
        return f"step {step}: exit code {code}: {line}"
    rows = metrics_of(folder)
    if [row.get("train/skipped", 0) for row in rows] != [float(row["step"] >= step) for row in rows]:
        return f"step {step}: not counted"
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        return f"step {step}: the metrics are not finite"
    return all_finite(folder)


def on(folder: Path, whole: Path, stage: str, breaks: Callable[..., Any], step: int) -> tuple[str, str]:
    begin(folder, stage, "stage.optim.max_skipped=0")
    with broken(breaks, step, math.inf):
        code, line = attempt(folder)
    if code != 2 or "model." not in line:
        return f"step {step}: exit code {code}: {line}", line
    saved = checkpoints.steps(RunFolder(folder).checkpoints)
    if saved != list(range(1, step)):
        return f"step {step}: saved are {saved}", line
    code, later = attempt(folder)
    return (f"did not go on: {later}" if code else all_finite(folder) or same_end(folder, whole)), line


def all_finite(folder: Path) -> str:
    for path in RunFolder(folder).checkpoints.glob("step-*/model.safetensors"):
        if not all(bool(torch.isfinite(weight).all()) for weight in load_file(path).values()):
            return f"{path.parent.name} holds what is not finite"
    return ""
