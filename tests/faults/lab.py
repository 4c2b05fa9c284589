"""Stages so small that each can be run, killed and run again a hundred times, with the parents they need."""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

from tiny_runs import tiny_run

from faults.forks import Kill, calls_of, run_job
from faults.points import ENDING, JUDGING, JUDGING_BY_MODELS, SAMPLING, SAVING, SHARDS, TRAINING, Point
from faults.same import both
from r1pipe.config import ParentRef
from r1pipe.core.paths import RunFolder
from r1pipe.runs.lineage import checkpoint_of_run

STEPS = ["stage.max_steps=4", "stage.save_every=2", "stage.eval.every=2", "stage.eval.every_problems=2"]
SFT = [*STEPS, "stage.demonstrations=16", "stage.batch_size=2"]
RL = [
    *STEPS,
    *(
        "stage.prompts_per_step=4",
        "stage.group_size=2",
        "stage.minibatches=2",
        "stage.sampling.max_tokens=12",
    ),
    *("stage.sampling.max_num_seqs=4", "stage.optim.lr=0.001"),
]
SAMPLED = [
    *STEPS,
    *("stage.prompts=64", "stage.samples_per_prompt=1", "stage.sampling.max_num_seqs=2"),  # four shards
    *("stage.sampling.max_tokens=8", "stage.batch_size=2"),
]
SETTINGS: dict[str, list[str]] = {
    "pretrain": [*STEPS, "stage.batch_size=2", "stage.sequence_length=128"],
    "cold_start": SFT,
    "grpo": [*RL, "stage.reference_every=1"],  # the reference is another one at every checkpoint
    "rejection_sft": SAMPLED,
    "expert_iteration": SAMPLED,
    "reward_model": [*STEPS, "stage.batch_size=2"],
    "all_scenario": [*RL, "stage.preference.last_steps=3", "stage.kl_coef=0.01"],
    "zero": RL,
    "control_sft": [*SFT, "stage.keep=1"],
    "distill": [*STEPS, "stage.batch_size=2"],
}
SOURCES = {  # what each reads besides its weights
    "rejection_sft": "grpo",
    "expert_iteration": "cold_start",
    "all_scenario": "reward_model",
    "distill": "rejection_sft",
}
MAKERS = {
    "grpo": "pretrain",
    "cold_start": "pretrain",
}  # random weights sample as badly as a policy of four steps
POINTS: dict[str, dict[str, Point]] = {
    **dict.fromkeys(("pretrain", "cold_start", "control_sft", "distill"), TRAINING | SAVING | ENDING),
    **dict.fromkeys(("grpo", "zero"), TRAINING | SAVING | ENDING | SAMPLING | JUDGING),
    "reward_model": TRAINING | SAVING | {k: v for k, v in ENDING.items() if k != "in evaluation"},
    "all_scenario": TRAINING | SAVING | ENDING | SAMPLING | JUDGING | JUDGING_BY_MODELS,
    **dict.fromkeys(
        ("rejection_sft", "expert_iteration"), TRAINING | SAVING | ENDING | SAMPLING | JUDGING | SHARDS
    ),
}


BESIDE = ("engine.async_save=true",)  # a copy is written while training goes on


@dataclass(frozen=True)
class Shape:
    """A stage, and how it is spread over processes."""

    stage: str
    ranks: int
    zero_level: int
    words: tuple[str, ...] = ()  # overrides besides its SETTINGS

    def __str__(self) -> str:
        return f"{self.stage}, {self.ranks} rank{'s' * (self.ranks > 1)}, ZeRO {self.zero_level}"


@dataclass
class Reference:
    """A run that nothing interrupted, and the points that each rank came by."""

    folder: Path
    calls: list[Counter[str]]

    def times(self, point: Point, name: str) -> int:
        """How often the rank that a kill there would meet came by."""
        return self.calls[point.rank % len(self.calls)][name]


@dataclass
class Lab:
    """Runs under one folder; parents and references are made once."""

    folder: Path
    references: dict[Shape, Reference] = field(default_factory=dict)
    tried: int = 0

    def source(self, name: str) -> ParentRef:
        """What a stage reads besides: a checkpoint to sample from, reward models, samples to learn from."""
        return checkpoint_of_run(RunFolder(self.reference(Shape(MAKERS.get(name, name), 1, 0)).folder))

    def prepared(self, folder: Path, shape: Shape) -> Path:
        """The folder as `r1pipe run` leaves it for the job."""
        source = SOURCES.get(shape.stage)
        reads = {source: self.source(source)} if source else {}
        engine = [f"engine.ranks={shape.ranks}", f"engine.zero_level={shape.zero_level}"]
        words = (*SETTINGS[shape.stage], *engine, *shape.words)
        return tiny_run(folder, f"stage={shape.stage}", *words, **reads)

    def reference(self, shape: Shape) -> Reference:
        if shape not in self.references:
            place = f"{shape.stage}-{shape.ranks}-{shape.zero_level}-whole-{len(self.references)}"
            folder = self.prepared(self.folder / place, shape)
            run_job(shape.stage, folder, shape.ranks)
            self.references[shape] = Reference(folder, calls_of(folder, shape.ranks))
        return self.references[shape]

    def moment(self, shape: Shape, point: str, seed: int) -> Kill:
        """A call of the point drawn from those of a run that nothing interrupts."""
        times = self.reference(shape).times(POINTS[shape.stage][point], point)
        assert times, f"{shape} never comes by '{point}'"
        return Kill(point, random.Random(f"{seed}/{shape}/{point}").randint(1, times))

    def killed(self, shape: Shape, kill: Kill) -> list[str]:
        """What is lost after a kill and the same command again; empty if nothing is."""
        self.tried += 1
        folder = self.prepared(self.folder / f"{shape.stage}-{self.tried}-killed", shape)
        assert run_job(shape.stage, folder, shape.ranks, kill), f"{shape}: {kill} did not land"
        run_job(shape.stage, folder, shape.ranks)
        lost = [*both(self.reference(shape).folder, folder), *self.shards_again(shape, folder)]
        if not lost:
            rmtree(folder)
        return lost

    def shards_again(self, shape: Shape, folder: Path) -> list[str]:
        """Of stage 3's sampled data at most one shard of each rank is made again."""
        whole, cut = self.reference(shape).calls, calls_of(folder, shape.ranks)
        again = [b["shard begun"] - a["shard begun"] for a, b in zip(whole, cut, strict=True)]
        return [f"shards made again, by rank: {again}"] if max(again) > 1 else []
