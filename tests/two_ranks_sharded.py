"""Launched on two ranks by test_sharded.py: sharded models, trained, read and replaced."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from jobs import engine_config
from test_engine import batch
from test_sharded import losses, weights

from r1pipe.config import EngineConfig
from r1pipe.model import Policy, load_pretrained
from r1pipe.model.policy import named_weights
from r1pipe.rewards.models import load_reward_model, open_empty, score_rows, stored_parts
from r1pipe.train.engine.frozen import FrozenModel
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import ShardedWeights, fill_sharded, load_sharded
from r1pipe.train.engine.writing import Writer


def read(frozen: FrozenModel) -> list[float]:
    """The mean logit of each of this rank's rows: one more on rank 1."""
    rows = batch()[: 1 + frozen.rank]
    closures = [partial(lambda row: frozen.module(row).float().mean(), row.unsqueeze(0)) for row in rows]
    return [value.item() for value in frozen.evaluate(closures)]


def judged(folder: Path, config: EngineConfig, rank: int) -> bool:
    """Whether a sharded reward model scores as a whole one, with rows on rank 1 alone."""
    rows = [[1, 5, 6], [1, 7]][: 2 * rank]
    model, stored = open_empty(folder)
    fill_sharded(model, stored, config, stored_parts(model))
    frozen, whole = FrozenModel(model, config), load_reward_model(folder)
    whole = whole if config.precision == "fp32" else whole.bfloat16()
    found = score_rows(frozen.module, rows, 0, frozen.evaluate)
    return len(found) == len(rows) and found == score_rows(whole, rows, 0)


def drawn_from(folder: Path, config: EngineConfig) -> bool:
    """Whether a sampler gets from a sharded model what it gets from a whole one, and it stays sharded."""
    weights = ShardedWeights(load_sharded(folder, config))
    expected = weights_of(load_pretrained(folder), config)
    sent: dict[str, torch.Tensor] = {}
    for bucket in weights.buckets(1000):
        sent |= {name: tensor.clone() for name, tensor in bucket.items()}
    with weights.gathered() as model:
        logits, other = model(batch()), load_pretrained(folder)
        other = other if config.precision == "fp32" else other.bfloat16()
        same = torch.equal(logits, other(batch()))
    emptied = all(parameter.numel() == 0 for parameter in weights.model.parameters())
    return same and emptied and same_tensors(sent, expected)


def weights_of(model: Policy, config: EngineConfig) -> dict[str, torch.Tensor]:
    return named_weights(model if config.precision == "fp32" else model.bfloat16())


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for precision in ("fp32", "bf16"):
        config = engine_config(2, 3, precision)
        ranks = Ranks(config)
        sharded, whole = FrozenModel(load_sharded(folder, config), config), load_pretrained(folder)
        shard = sum(p.ds_tensor.numel() for p in sharded.module.parameters())
        policy = load_sharded(folder, config)
        begun = read(sharded)
        told = {
            "losses": losses(policy, 2, precision),
            "of whole": losses(load_pretrained(folder), 2, precision),
            "read": begun,
            "read whole": read(FrozenModel(whole, engine_config(2, 1, precision))),
            "share": shard / sum(p.numel() for p in whole.parameters()),
        }
        sharded.copy(policy)
        replaced = read(sharded)
        sharded.save(folder / "replaced", Writer(folder))
        ranks.barrier()
        told |= {"moved": replaced != begun}
        again = FrozenModel(load_sharded(folder, config), config)
        again.load(folder / "replaced")
        told |= {"restored": read(again) == replaced}
        told["equal"] = all(
            torch.equal(one, other)
            for one, other in zip(weights(policy).values(), weights(again.module).values(), strict=True)
        )
        told["drawn from"] = drawn_from(folder, config)
        told["judged"] = all(judged(folder / kind, config, ranks.rank) for kind in ("judge", "qwen2"))
        found[precision] = ranks.all_gather_objects(told)
        if ranks.rank == 0:
            shutil.rmtree(folder / "replaced")
    if ranks.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
