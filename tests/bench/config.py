"""What is measured (conf/bench/*.yaml) and the job of a contestant. Imports torch only to name a GPU."""

from dataclasses import dataclass, field, replace
from typing import Any

from bench.turns import DTYPES, lengths
from r1pipe.config import ModelConfig
from r1pipe.config.fields import Strict, build
from r1pipe.config.groups import options, read
from r1pipe.core.errors import ConfigError, EnvironmentProblem, nearest

KINDS = ("sample", "train", "grpo", "update")
PEERS = ("transformers", "vllm", "trl")
# The options that each contestant requires (for one kind of case, where that has its own).
OPTIONS = {
    "ours": set(),
    "ours/train": {"attention", "compile", "recompute"},  # keys of conf/engine
    "ours/sample": {"graphs"},  # likewise
    "ours_fp8": {"attention", "kernels", "recompute"},  # likewise; it trains, and is compared with ours
    "transformers": {"attention", "experts"},
    "trl": {"attention", "experts"},
    "transformers/dense": {"attention"},
    "trl/dense": {"attention"},
    "vllm": {"eager"},  # "true": no torch.compile
}


@dataclass(frozen=True)
class Case(Strict):
    """One piece of work that every contestant does, with the ratios it is judged by."""

    # "sample", "train" (forward, backward, AdamW), "grpo" (a whole step with KL) or "update" (that step
    # without sampling, on given completions of different lengths)
    kind: str
    models: list[str]  # files in conf/model/, or names of `dense`
    sequences: int  # sequences at once; for grpo, prompts times `group`
    group: int  # samples of each prompt (grpo), else 1
    prompt: int  # tokens of a prompt; of a whole row in training
    new: int  # tokens sampled per sequence (update: of the longest completion); 0 in training
    peers: list[str]  # "transformers", "vllm" or "trl"
    floors: dict[str, float]  # peer -> the ratio that ours must reach
    goals: dict[str, float]  # peer -> the ratio that ours should reach
    busy: bool = False  # measured idle and beside one busy process for each thread

    @property
    def tokens(self) -> int:
        """What a speed counts: sampled tokens, or tokens trained on."""
        if self.kind == "update":
            return sum(lengths(self.sequences, self.new))
        return self.sequences * (self.new or self.prompt)


@dataclass(frozen=True)
class Setting(Strict):
    """How a contestant runs its model."""

    dtype: str  # "fp32", "bf16" or (ours_fp8) "fp8": what it computes in; training keeps float32 weights
    options: dict[str, str]  # the contestant's own, see OPTIONS

    def __str__(self) -> str:
        return " ".join([self.dtype, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class DenseShape(Strict):
    """A Llama of transformers, with random weights (model=hf)."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


Shape = ModelConfig | DenseShape


@dataclass(frozen=True)
class FP8Step(Strict):
    """Training steps in FP8 beside the same in BF16: how much faster, and whether they learn the same."""

    case: Case  # of kind "train"; its floor and goal are of "bf16"
    steps: int
    loss: float  # how far apart the two losses may be after them, relatively


@dataclass(frozen=True)
class BenchConfig(Strict):
    """A whole bench."""

    device: str  # "cpu" or "cuda"
    threads: int  # CPU threads of every contestant
    rounds: int  # measured repetitions, contestants in turn; the median counts
    matmul: int  # side of the square matmul that gives the peak
    copied: int  # bytes of the copy that gives the bandwidth of memory
    cases: list[Case]
    settings: dict[str, list[Setting]]  # by the names of OPTIONS: what is tried; the fastest is measured
    fp8: FP8Step | None
    dense: dict[str, DenseShape] = field(default_factory=dict)

    def settings_of(self, contestant: str, kind: str, model: str = "") -> list[Setting]:
        """What is tried in a kind of case and with a model: their own settings, or else the contestant's."""
        own = [f"{contestant}/dense"] if model in self.dense else []
        for name in [*own, f"{contestant}/{kind}"]:
            if name in self.settings:
                return self.settings[name]
        return self.settings[contestant]

    def shape(self, model: str) -> Shape:
        """Of `dense`, or of conf/model/."""
        return self.dense[model] if model in self.dense else load_model(model)


@dataclass(frozen=True)
class ProductsConfig(Strict):
    """Which products [M, K] x [N, K] are measured in FP8 and in BF16 (conf/bench/products.yaml)."""

    device: str
    threads: int
    matmul: int  # side of the square matmul that gives the peak
    seconds: float  # of repeated launches, of which the median counts
    rows: list[int]  # M
    shapes: list[list[int]]  # [N, K]
    groups: list[list[int]]  # [experts, rows of each]
    grouped_shapes: list[list[int]]  # [N, K] of each expert
    quantised: list[int]  # [rows, columns] that quantising is measured on
    judged_rows: int  # floor and goal count from so many rows on: with fewer, reading the weights dominates
    floors: dict[str, float]  # "chosen" (what engine.kernels=auto takes) or "triton" -> times as fast as BF16
    goal_tflops: float  # of the chosen backend


@dataclass(frozen=True)
class Job(Strict):
    """The work of one contestant's process."""

    contestant: str
    case: Case
    model: str
    vocab_size: int
    weights: str  # folder in the published format
    setting: Setting
    device: str
    threads: int


def load_bench(name: str) -> BenchConfig:
    """conf/bench/<name>.yaml. Raises ConfigError with the key that is wrong."""
    config = build(BenchConfig, _read("bench", name), "bench")
    for index, case in enumerate(config.cases):
        _check_case(case, f"bench.cases[{index}]")
    if config.fp8:
        _check_case(config.fp8.case, "bench.fp8.case")
    for name, settings in config.settings.items():
        dtypes = ("fp8",) if name == "ours_fp8" else DTYPES
        for setting in settings:
            if setting.dtype not in dtypes or set(setting.options) != OPTIONS.get(name):
                raise ConfigError(f"bench.settings.{name}: {setting} is no setting of {name}")
    return config


def _check_case(case: Case, where: str) -> None:
    """Raises ConfigError with the key that is wrong."""
    if case.kind not in KINDS:
        raise ConfigError(f"{where}.kind={case.kind} must be one of {', '.join(KINDS)}")
    if case.group < 1 or case.sequences % case.group:
        raise ConfigError(f"{where}.sequences={case.sequences} must be a multiple of group={case.group}")
    if unknown := set(case.peers) - set(PEERS):
        raise ConfigError(f"{where}.peers holds {sorted(unknown)[0]}; choose from {', '.join(PEERS)}")


def load_products() -> ProductsConfig:
    """conf/bench/products.yaml."""
    return build(ProductsConfig, _read("bench", "products"), "products")


def of_model(config: BenchConfig, model: str) -> BenchConfig:
    """The same with every case on one model."""
    fp8 = config.fp8 and replace(config.fp8, case=replace(config.fp8.case, models=[model]))
    return replace(config, cases=[replace(case, models=[model]) for case in config.cases], fp8=fp8)


def rehearsal(config: BenchConfig) -> BenchConfig:
    """The same cases and settings, so small that all are tried in minutes: their figures mean nothing."""

    def small(case: Case) -> Case:
        sequences, new = 2 * case.group, min(case.new, 3)
        return replace(case, sequences=sequences, prompt=8, new=new, floors={}, goals={})

    fp8 = config.fp8 and replace(config.fp8, case=small(config.fp8.case), steps=1, loss=1.0)
    return replace(
        config, rounds=1, matmul=64, copied=2**20, cases=[small(case) for case in config.cases], fp8=fp8
    )


def small_products(config: ProductsConfig) -> ProductsConfig:
    """Every kind of product, so small that they take seconds: their figures mean nothing."""
    return replace(
        config,
        matmul=64,
        seconds=0.01,
        rows=[8],
        shapes=[[128, 256]],
        groups=[[2, 24]],
        grouped_shapes=[[128, 256]],
        quantised=[32, 256],
        floors={},
    )


def load_model(name: str) -> ModelConfig:
    return build(ModelConfig, _read("model", name), "model")


def _read(folder: str, name: str) -> dict[str, Any]:
    """conf/<folder>/<name>.yaml. Raises ConfigError where there is none."""
    if name not in options(folder):
        raise ConfigError(f"conf/{folder}/ has no {name}.yaml; {nearest(name, options(folder))}")
    return read(f"{folder}/{name}")


def gpu_name() -> str:
    """The GPU as its driver calls it. Raises EnvironmentProblem where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentProblem("needs a CUDA GPU and a CUDA build of torch; there is none here")
    return torch.cuda.get_device_name()
