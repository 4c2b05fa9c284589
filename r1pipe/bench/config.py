"""What is measured (conf/bench/*.yaml) and what a contestant's process is told. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from r1pipe.config.groups import read
from r1pipe.config.schema import ModelConfig
from r1pipe.config.typed import build
from r1pipe.errors import ConfigError

KINDS = ("sample", "train", "grpo")


@dataclass(frozen=True)
class Case:
    """One piece of work that every contestant does, with the ratios it is judged by."""

    kind: str  # "sample", "train" (forward, backward, AdamW) or "grpo" (a whole step with KL)
    models: list[str]  # files in conf/model/
    sequences: int  # sequences at once; for grpo, prompts times `group`
    group: int  # samples of each prompt (grpo), else 1
    prompt: int  # tokens of a prompt; of a whole row in training
    new: int  # tokens sampled per sequence; 0 in training
    peers: list[str]  # "transformers", "vllm" or "trl"
    floors: dict[str, float]  # peer -> the ratio that ours must reach
    goals: dict[str, float]  # peer -> the ratio that ours should reach

    @property
    def tokens(self) -> int:
        """What a speed counts: sampled tokens, or tokens trained on."""
        return self.sequences * (self.new or self.prompt)


@dataclass(frozen=True)
class Setting:
    """How a contestant runs its model; those that do not apply to it are left as they are."""

    dtype: str  # "fp32" or "bf16"
    attention: str  # transformers: "eager" or "sdpa"; ours: "sdpa"
    experts: str  # transformers: "eager", "grouped_mm" or "batched_mm"; ours: "grouped_mm"
    compiled: bool  # torch.compile; transformers samples with its static cache then
    micro_batches: int  # parts of a training batch: smaller ones stay in the cache
    micro_tokens: int  # ours, grpo: padded tokens per forward pass of the update

    def __str__(self) -> str:
        return " ".join(
            [self.dtype, self.attention, self.experts, *(["compiled"] if self.compiled else [])]
        )


@dataclass(frozen=True)
class BenchConfig:
    """A whole bench."""

    device: str  # "cpu" or "cuda"
    threads: int  # CPU threads of every contestant
    rounds: int  # measured repetitions, contestants in turn; the median counts
    matmul: int  # side of the square matmul that gives the peak
    cases: list[Case]
    settings: dict[str, list[Setting]]  # "ours", "transformers" ...: what is tried; the fastest is measured


@dataclass(frozen=True)
class Job:
    """What one contestant's process is told."""

    contestant: str
    case: Case
    model: ModelConfig
    weights: str  # folder in the published format
    setting: Setting
    device: str
    threads: int

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def load_bench(name: str) -> BenchConfig:
    """conf/bench/<name>.yaml. Raises ConfigError with the key that is wrong."""
    config = build(BenchConfig, read(f"bench/{name}"), "bench")
    for index, case in enumerate(config.cases):
        where = f"bench.cases[{index}]"
        if case.kind not in KINDS:
            raise ConfigError(f"{where}.kind={case.kind} must be one of {', '.join(KINDS)}")
        if case.sequences % case.group:
            raise ConfigError(f"{where}.sequences={case.sequences} must be a multiple of group={case.group}")
    return config


def load_model(name: str) -> ModelConfig:
    return build(ModelConfig, read(f"model/{name}"), "model")
