"""Run on two ranks, from test_ppo.py: the engines of a policy and a value model in turn."""

import json
import sys
from pathlib import Path

import torch
from jobs import engine_config, tiny_model
from tiny_runs import tiny_config

from r1pipe.core.types import Completion, Group, Prompt
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.update import update

PROMPT = Prompt("p", "word", "en", "?", "4")
ROWS = [[7, 8], [9, 3, 5, 2], [7], [6, 6, 2]]
PROMPTS = [[1, 5, 6], [4]]
WORDS = (
    *(
        "stage=grpo",
        "stage.algorithm=ppo",
        "stage.minibatches=1",
        "stage.optim.lr=0.01",
        "stage.max_steps=40",
    ),
    *(
        "stage.kl_coef=0",
        "stage.optim.schedule=constant",
        "stage.optim.min_lr=0",
        "stage.loss_aggregation=token",
    ),
)


def groups_of(rewards: list[float]) -> list[Group]:
    """Two groups of two completions of several lengths, for PROMPTS."""
    done = [Completion(row, [-3.0] * len(row), "stop") for row in ROWS]
    return [
        Group(PROMPT, done[i : i + 2], [{}, {}], rewards[i : i + 2], [0.0, 0.0], prompt_tokens=tokens)
        for i, tokens in zip((0, 2), PROMPTS, strict=True)
    ]


def trained(level: int, ranks: int) -> tuple[Engine, Critic, list[dict[str, float]]]:
    """Four updates of both at a ZeRO level, on groups dealt out to the ranks."""
    stage = tiny_config(*WORDS).stage
    policy = tiny_model()
    critic = Critic(tiny_model(), stage, stage.ppo, engine_config(ranks, level))
    engine = Engine(policy, stage.optim, stage.router, engine_config(ranks, level), 4)
    found = []
    for _ in range(4):
        groups, mine = groups_of([1.0, 0.0, -1.0, 0.5]), slice(engine.rank, None, ranks)
        rollouts, metrics = critic.estimate(groups[mine], None)
        metrics |= update(engine, rollouts, stage, None)
        metrics |= critic.learn(rollouts)
        found.append(metrics)
    return engine, critic, found


def size_of(engine: Engine) -> float:
    with engine.gathered() as model:
        return sum(weight.double().abs().sum().item() for weight in model.parameters())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    told = {}
    for level in (0, 1, 2, 3):
        engine, critic, found = trained(level, 2)
        sizes = [engine.all_gather_objects(size_of(one)) for one in (engine, critic.engine)]
        for name, one in (("policy", engine), ("critic", critic.engine)):
            one.save(folder / f"level-{level}" / name, {})
            one.load(folder / f"level-{level}" / name)
        told[level] = {"metrics": found, "sizes": sizes}
    if engine.rank == 0:
        (folder / "found.json").write_text(json.dumps(told))
    exit_immediately_with(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
