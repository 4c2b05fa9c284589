"""Launched on some ranks by test_sharded.py: the most memory that a rank takes at ZeRO level 3.

The folder's name says for which training; the model is in its parent.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from rl_runs import rollout_of
from tiny_runs import tiny_config

from r1pipe.config import EngineConfig
from r1pipe.data.packing import Packed
from r1pipe.rewards.models import RewardModel
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import load_sharded
from r1pipe.train.rl.reward_model import Examples, Item, micro_losses
from r1pipe.train.rl.update import Reference, update
from r1pipe.train.sft.loop import LMLoss

STEPS = 2  # from the second on, DeepSpeed knows the order of the layers and gathers ahead


def anonymous() -> float:
    """MiB of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(found: list[float]) -> Iterator[None]:
    """Note the most that a block takes beside what was there before, looked at two hundred times a second."""
    before, done = anonymous(), threading.Event()
    most = [before]

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    found.append(most[0] - before)


def sft(folder: Path, config: EngineConfig) -> Engine:
    engine = Engine(load_sharded(folder, config), OPTIM, ROUTER, config, 10)
    rows = [Packed([1, 5, 6, 7], [1] * 4, [False, True, True, True]) for _ in range(engine.world_size)]
    for _ in range(STEPS):
        engine.train_step(LMLoss(engine, rows, 0.0, 0.0, pad_id=0).micro_losses(1))
    return engine


def grpo(folder: Path, config: EngineConfig) -> Engine:
    """With a KL, so with a reference."""
    stage = replace(tiny_config("stage=grpo", "stage.kl_coef=0.1", "stage.minibatches=1").stage, optim=OPTIM)
    reference = Reference(load_sharded(folder, config), config)
    engine = Engine(load_sharded(folder, config), OPTIM, ROUTER, config, 10)
    rollouts = [rollout_of([1, 5, 6], [7, 8, 9], [-1.0] * 3, sign) for sign in (1.0, -1.0)]
    for _ in range(STEPS):
        update(engine, rollouts, stage, reference)
    return engine


def reward_model(folder: Path, config: EngineConfig) -> Engine:
    engine = Engine(RewardModel(load_sharded(folder, config)), OPTIM, ROUTER, config, 10)
    pairs = Examples("helpful", [Item([[1, 5, 6], [1, 5, 7]])], [], pad_id=0)
    for _ in range(STEPS):
        engine.train_step(micro_losses(engine, pairs, [pairs.learned], 0.0))
    return engine


TRAININGS: dict[str, Callable[[Path, EngineConfig], Engine]] = {
    "sft": sft,
    "grpo": grpo,
    "reward_model": reward_model,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = engine_config(Ranks(engine_config()).world_size, 3, "bf16")
    engine = Engine(tiny_model(), OPTIM, ROUTER, config, 10)  # what a first step brings in
    engine.train_step([lambda: engine.module(torch.tensor([[1, 2, 3]])).float().square().mean()])
    found: list[float] = []
    with peak(found):
        engine = TRAININGS[folder.name](folder.parent, config)
    told = engine.all_gather_objects(found[0])
    if engine.rank == 0:
        (folder / "found.json").write_text(json.dumps(told))
    engine.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
