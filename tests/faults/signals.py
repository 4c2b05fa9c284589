"""SIGTERM and Ctrl-C at a random moment: a checkpoint, then exit; what goes on has the same bits."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

from bits import same_bits
from rl_runs import metrics_of
from watched import Ended, end_of, ends, signals_here, start

from faults.outcome import Outcome
from r1pipe.runs import stopping

STEPS = 60  # of some hundredths of a second
RL = ("stage=grpo", f"stage.max_steps={STEPS}", "stage.save_every=0", "stage.sampling.max_tokens=32")


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    draw = random.Random(f"signals/{seed}")
    yield asked_once(folder, draw)
    yield asked_twice(folder)
    if not short:
        for ranks in (1, 2):
            # a job that ends before its signal comes handles it no more, and this process must not die of it
            with stopping.handling(lambda *_: None):
                outcome = same_in_the_end(folder / f"{ranks}", ranks, draw)
            yield outcome


def asked_once(folder: Path, draw: random.Random) -> Outcome:
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    ended = on_fakes(folder / "once", "ok", number)
    saved = [path.name for path in ended.run.checkpoints.glob("step-*")]
    held = ended.code == 128 + number and len(saved) == 1
    return Outcome(f"{number.name} (no training)", 1, int(held), f"{ended.line} ({ended.seconds:.0f} s)")


def asked_twice(folder: Path) -> Outcome:
    ended = on_fakes(folder / "twice", "stays", signal.SIGINT, signal.SIGINT)
    held = ended.code == 130 and "within engine.grace_s" not in ended.line
    return Outcome("Ctrl-C twice (no training)", 1, int(held), f"{ended.line} ({ended.seconds:.0f} s)")


def on_fakes(folder: Path, how: str, *numbers: signal.Signals) -> Ended:
    folder.mkdir()
    return end_of(how, folder, 2, act=signals_here(*numbers))


def same_in_the_end(folder: Path, ranks: int, draw: random.Random) -> Outcome:
    """Interrupted until it is done, each time after at least one more step."""
    words = (*RL, f"engine.ranks={ranks}")
    fault = f"SIGTERM while {ranks} rank{'s' * (ranks > 1)} learn{'s' * (ranks < 2)}"
    for name in ("whole", "broken"):
        (folder / name).mkdir(parents=True)
    whole = ends(start(folder / "whole", *words), lambda: True)
    if whole.code:
        return Outcome(fault, 1, 0, whole.line)
    slowest, tries, line = 0.0, 0, ""
    while True:
        job = start(folder / "broken", *words)
        before = steps_of(job.run.metrics)
        act = signals_here(signal.SIGTERM, after_s=draw.uniform(0.0, 0.5))
        ended = ends(job, lambda: steps_of(job.run.metrics) > before, act)  # noqa: B023
        if ended.code == 0:
            break
        tries, slowest, line = tries + 1, max(slowest, ended.seconds), ended.line
        if ended.code != 143 or "resumes from step" not in line:
            return Outcome(fault, tries, tries - 1, f"exit code {ended.code} after {slowest:.0f} s: {line}")
    if not tries:
        return Outcome(fault, 1, 0, "each signal came too late")
    same = same_bits(whole.run.path, ended.run.path, STEPS)
    same = same and metrics_of(whole.run.path) == metrics_of(ended.run.path)
    told = f"{line} (at most {slowest:.0f} s; the same bits in the end)" if same else "other bits in the end"
    return Outcome(fault, tries, tries if same else 0, told)


def steps_of(metrics: Path) -> int:
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
