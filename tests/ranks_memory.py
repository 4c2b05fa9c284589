"""Launched on some ranks by test_sharded.py: the most memory that a rank takes at ZeRO level 3."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from rl_runs import rollout_of
from tiny_runs import tiny_config

from r1pipe.config import EngineConfig
from r1pipe.rewards.models import RewardModel
from r1pipe.train.engine import engine as engines
from r1pipe.train.engine import frozen, patches, sharded
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import load_sharded
from r1pipe.train.rl.reward_model import Examples, Item, micro_losses
from r1pipe.train.rl.update import Reference, update

ELEMENTS = 2_000_000  # what DeepSpeed collects before it sends, and keeps whole beside; by default up to 1e9
settings = frozen.deepspeed_config


def small_buffers(config: EngineConfig, grad_clip: float) -> dict:
    """DeepSpeed's buffers have a fixed size, which hides the shares of a model as small as here."""
    found = settings(config, grad_clip)
    zero = found["zero_optimization"]
    zero |= {"reduce_bucket_size": ELEMENTS, "stage3_prefetch_bucket_size": ELEMENTS}
    zero |= {"stage3_max_live_parameters": ELEMENTS, "stage3_max_reuse_distance": ELEMENTS}
    return found


def anonymous() -> float:
    """MiB of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(found: dict[str, float], name: str) -> Iterator[None]:
    """Note the most that a block takes beside what was there before, looked at a hundred times a second."""
    before, most, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    found[name] = most[0] - before


def trained(model: torch.nn.Module, config: EngineConfig) -> None:
    engine = Engine(model, OPTIM, ROUTER, config, 10)
    engine.train_step([lambda: engine.module(torch.tensor([[1, 2, 3]])).float().square().mean()])


def main(folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    for module in (engines, frozen, sharded):
        module.deepspeed_config = small_buffers
    config = replace(engine_config(ranks, 3, "bf16"))
    ranks = Ranks(config)
    ranks.start()
    patches.start_deepspeed(ranks.device)
    trained(tiny_model(), config)  # what a first step brings in
    found: dict[str, float] = {}
    stage = replace(tiny_config("stage=grpo", "stage.kl_coef=0.1", "stage.minibatches=1").stage, optim=OPTIM)
    with peak(found, "GRPO with a KL"):
        reference = Reference(load_sharded(folder, config), config)
        engine = Engine(load_sharded(folder, config), OPTIM, ROUTER, config, 10)
        rollouts = [rollout_of([1, 5, 6], [7, 8, 9], [-1.0] * 3, sign) for sign in (1.0, -1.0)]
        for _ in range(2):
            update(engine, rollouts, stage, reference)
    del reference, engine
    with peak(found, "a reward model"):
        engine = Engine(RewardModel(load_sharded(folder, config)), OPTIM, ROUTER, config, 10)
        pairs = Examples("helpful", [Item([[1, 5, 6], [1, 5, 7]])], [], pad_id=0)
        for _ in range(2):
            engine.train_step(micro_losses(engine, pairs, [pairs.learned], 0.0))
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    told = engine.all_gather_objects(found)
    if engine.rank == 0:
        content = {"MiB": told, "parameters": whole}
        (folder / "found.json").write_text(json.dumps(content))
    engine.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Ranks(engine_config()).world_size)
