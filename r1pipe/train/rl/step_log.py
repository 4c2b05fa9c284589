"""A step told: its rollouts and metrics written, its tripwires looked at, one of its completions shown."""

import time
from collections.abc import Sequence

from r1pipe.config import RLConfig
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.rows import Row, sample_of, speeds, write_rows
from r1pipe.train.rl.tripwires import Trip, Tripwires
from r1pipe.train.run import Run


def log_step(
    run: Run[RLConfig],
    engine: Engine,
    wires: Tripwires,
    step: int,
    rows: Sequence[Row],
    metrics: dict[str, float],
    began: float,
) -> list[Trip]:
    """The wires that trip in this step, which are among its metrics, on the screen and in tripwires.jsonl.

    All ranks call; `began` is when the step did, by time.monotonic(). `metrics` gains speeds and trips.
    """
    if engine.rank == 0:
        write_rows(rows, run.folder.rollouts / f"step-{step}.parquet")
    metrics |= speeds(rows, metrics, time.monotonic() - began)
    trips = engine.all_gather_objects(wires.check(metrics))[0]  # times differ between ranks: rank 0 decides
    for trip in trips:
        metrics[f"tripwire/{trip.name}"] = trip.value
        run.tripped(step, trip.name, trip.message)
    run.log(step, metrics)
    run.show(sample=sample_of(rows, run.rng("shown", step)))
    return trips
