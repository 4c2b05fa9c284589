"""What is measured (conf/bench/*.yaml) and what a contestant's process is told. Imports no torch."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from r1pipe.config.groups import options, read
from r1pipe.config.schema import ModelConfig
from r1pipe.config.typed import build
from r1pipe.errors import ConfigError, nearest

KINDS = ("sample", "train", "grpo")
PEERS = ("transformers", "vllm", "trl")
# Which options each contestant (for one kind of case, where that has its own) knows, and asks for.
OPTIONS = {
    "ours": set(),
    "ours/train": {"attention", "compile", "recompute"},  # keys of conf/engine
    "ours/sample": {"graphs"},  # likewise
    "transformers": {"attention", "experts"},
    "trl": {"attention", "experts"},
    "vllm": {"eager"},  # "true": no torch.compile
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # as torch calls them


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
    """How a contestant runs its model."""

    dtype: str  # "fp32" or "bf16": what it computes in; training keeps float32 weights
    options: dict[str, str]  # the contestant's own, see OPTIONS

    def __str__(self) -> str:
        return " ".join([self.dtype, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class BenchConfig:
    """A whole bench."""

    device: str  # "cpu" or "cuda"
    threads: int  # CPU threads of every contestant
    rounds: int  # measured repetitions, contestants in turn; the median counts
    matmul: int  # side of the square matmul that gives the peak
    cases: list[Case]
    settings: dict[str, list[Setting]]  # by the names of OPTIONS: what is tried; the fastest is measured

    def settings_of(self, contestant: str, kind: str) -> list[Setting]:
        """What is tried in a kind of case: its own settings, or else the contestant's."""
        return self.settings.get(f"{contestant}/{kind}") or self.settings[contestant]


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
    config = build(BenchConfig, _read("bench", name), "bench")
    for index, case in enumerate(config.cases):
        where = f"bench.cases[{index}]"
        if case.kind not in KINDS:
            raise ConfigError(f"{where}.kind={case.kind} must be one of {', '.join(KINDS)}")
        if case.group < 1 or case.sequences % case.group:
            raise ConfigError(f"{where}.sequences={case.sequences} must be a multiple of group={case.group}")
        if unknown := set(case.peers) - set(PEERS):
            raise ConfigError(f"{where}.peers holds {sorted(unknown)[0]}; choose from {', '.join(PEERS)}")
    for name, settings in config.settings.items():
        for setting in settings:
            if setting.dtype not in DTYPES or set(setting.options) != OPTIONS.get(name):
                raise ConfigError(f"bench.settings.{name}: {setting} is no setting of {name}")
    return config


def rehearsal(config: BenchConfig) -> BenchConfig:
    """The same cases and settings, so small that all are tried in minutes: their figures mean nothing."""
    cases = [
        replace(case, sequences=2 * case.group, prompt=8, new=min(case.new, 3), floors={}, goals={})
        for case in config.cases
    ]
    return replace(config, rounds=1, matmul=64, cases=cases)


def load_model(name: str) -> ModelConfig:
    return build(ModelConfig, _read("model", name), "model")


def _read(folder: str, name: str) -> dict[str, Any]:
    """conf/<folder>/<name>.yaml. Raises ConfigError where there is none."""
    if name not in options(folder):
        raise ConfigError(f"conf/{folder}/ has no {name}.yaml; {nearest(name, options(folder))}")
    return read(f"{folder}/{name}")
