"""All that a job knows: the content of config.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator

from r1pipe.config.benchmark import BenchmarkConfig
from r1pipe.config.data import DataConfig
from r1pipe.config.distill import DistillConfig
from r1pipe.config.engine import EngineConfig
from r1pipe.config.fields import Count, Strict, build, shown
from r1pipe.config.hf import NAME as HF
from r1pipe.config.hf import HFConfig
from r1pipe.config.model import ModelConfig
from r1pipe.config.rl import RLConfig, TripwiresConfig
from r1pipe.config.sampler import SamplerConfig
from r1pipe.config.screening import ScreeningConfig
from r1pipe.config.stages import (
    EvaluateConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
    StageConfig,
)
from r1pipe.core.errors import ConfigError, nearest

WITH_DOCUMENTS = "world"  # the data.kind that has text to pre-train on
STAGE_TYPES: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "base": EvaluateConfig,
    "evaluate": EvaluateConfig,
    "cold_start": SFTConfig,
    "control_sft": SFTConfig,
    "grpo": RLConfig,
    "zero": RLConfig,
    "rejection_sft": RejectionConfig,
    "expert_iteration": RejectionConfig,
    "reward_model": RewardModelConfig,
    "all_scenario": RLConfig,
    "distill": DistillConfig,
}


def build_stage(mapping: Any) -> StageConfig:
    """A stage's config, of the class that its name has. Raises ConfigError."""
    name = mapping.get("name") if isinstance(mapping, dict) else None
    if not isinstance(mapping, dict) or name in STAGE_TYPES:
        return build(STAGE_TYPES.get(name or "", StageConfig), mapping, "stage")
    raise ConfigError(f"stage.name={shown(name)} is no stage; {nearest(str(name), STAGE_TYPES)}")


def build_model(mapping: Any) -> ModelConfig | HFConfig:
    """A model's config, of the class that its name has. Raises ConfigError."""
    is_hf = isinstance(mapping, dict) and mapping.get("name") == HF
    return build(HFConfig, mapping, "model") if is_hf else build(ModelConfig, mapping, "model")


@dataclass
class RecipeConfig(Strict):
    """A whole reproduction: which stages, in which order; its values for them lie in the same file."""

    name: str  # the file in conf/recipe/
    stages: list[str]  # the stages of the recipe itself, in order
    controls: list[str]  # stages run beside them for comparison


@dataclass
class ParentRef(Strict):
    """A resolved parent: which checkpoint, and how to know that it is still the same."""

    stage: str  # the stage that made it
    run_id: str  # its run folder's name ("bundled" for data/base)
    checkpoint: str  # folder with the weights
    hash: str  # hash of its manifest


@dataclass
class TrackingConfig(Strict):
    """Where MLflow keeps runs; metrics.jsonl in the run folder is always written."""

    enabled: bool  # false: no MLflow at all
    uri: str | None  # server or database; by default $MLFLOW_TRACKING_URI; null: sqlite under the root folder
    experiment: str  # MLflow experiment's name
    model_name: str  # registered model whose versions are the checkpoints


@dataclass
class ChatConfig(Strict):
    """How conversations begin; the chat template itself comes with the weights."""

    system: str | None  # system prompt of conversations that bring none; "": none; null: that of the weights


@dataclass
class RunConfig(Strict):
    """All that a job knows: the content of config.json."""

    seed: Count  # root of every random stream
    root: str  # where run folders and the MLflow store go
    pipeline: str  # name that groups the runs of one reproduction
    parent: str | None  # CHECKPOINT to start from instead of the newest of `stage.starts_from`
    teacher: str | None  # of distillation: CHECKPOINT, a Hugging Face folder, or the URL of a server
    model: Annotated[ModelConfig | HFConfig, PlainValidator(build_model)]
    data: DataConfig
    chat: ChatConfig
    engine: EngineConfig
    sampler: SamplerConfig  # of engine.sampler=vllm
    stage: Annotated[StageConfig, PlainValidator(build_stage)]
    recipe: RecipeConfig
    tracking: TrackingConfig
    tripwires: TripwiresConfig  # of reinforcement
    benchmark: BenchmarkConfig | None  # what an evaluation measures, and how; null: held-out problems
    screening: ScreeningConfig  # of training data
    weights_from: ParentRef | None  # filled at launch
    reads_from: dict[str, ParentRef]  # filled at launch: stage name -> checkpoint
    teacher_from: ParentRef | None  # filled at launch, where the teacher is a checkpoint


def load(mapping: Mapping[str, Any]) -> RunConfig:
    """A resolved mapping as RunConfig. Raises ConfigError naming the wrong, missing or unknown key."""
    return build(RunConfig, mapping)


def read_config(path: Path | str) -> RunConfig:
    """The RunConfig of a run folder's config.json. Raises ConfigError."""
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the folder of a run") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None
    return load({"benchmark": None, **mapping}) if isinstance(mapping, dict) else load(mapping)


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The config as it is written to config.json."""
    return asdict(config)
