"""Draw docs/pipeline.svg: what the engine's executor does when passes sleep instead of computing.

python tests/pipeline_timelines.py docs/pipeline.svg      # some five minutes: gloo ranks, artificial times
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forked import codes, ranks
from torch import Tensor

from r1pipe.config.parts import rank_of
from r1pipe.plan import timeline
from r1pipe.runs.files import write_json
from r1pipe.train.engine import schedule

MICROS, FORWARD = 16, 0.5  # seconds of a forward pass on all layers of a rank; backward takes twice that


class Sleeping:
    """Parts whose forward pass, and either half of the backward pass, take as long."""

    def __init__(self, parts: int, seconds: float):
        self.last, self.seconds = parts - 1, seconds

    def empty(self, micro: int) -> Tensor:
        return torch.empty(8)

    def forward(self, part: int, micro: int, received: Tensor | None) -> Tensor | None:
        time.sleep(self.seconds)
        return None if part == self.last else torch.zeros(8)

    def backward(self, kind: str, part: int, micro: int, gradient: Tensor | None) -> Tensor | None:
        time.sleep(self.seconds * (2 if kind == schedule.B else 1))
        return None if kind == schedule.W or part == 0 else torch.zeros(8)


def job(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    for name in ("1f1b", "zbv", "dualpipev"):
        places = rank_of(name, count)
        work = Sleeping(len(places), FORWARD * count / len(places))
        order = schedule.order_of(name, count, rank, MICROS)
        dist.barrier()
        log = schedule.run(order, schedule.Messages(places, None, range(count), work))
        logs: list[list[schedule.Logged]] = [[] for _ in range(count)]
        dist.all_gather_object(logs, log)
        if rank == 0:
            write_json(folder / f"{count}-{name}.json", {"schedule": name, "ranks": logs})


def main(picture: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        for count in (4, 8):
            with ranks(Path(place), job, count) as started:
                assert codes(started) == [0] * count
        found = [timeline.read(path) for path in sorted(Path(place).glob("*.json"))]
    picture.write_text(timeline.svg(found), encoding="utf-8")
    print("\n".join(map(timeline.summary, found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
