"""All that a job knows: the content of config.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator

from r1pipe.config.data import STYLES, DataConfig, data_rules, share_rules
from r1pipe.config.engine import (
    EngineConfig,
    engine_rules,
    equal_rules,
    expert_rules,
    fp8_rules,
    hosts_rules,
    pipeline_rules,
    sampler_precision_rules,
)
from r1pipe.config.fields import Count, Rules, Strict, build, check_all, shown
from r1pipe.config.hf import NAME as HF
from r1pipe.config.hf import HFConfig, hf_rules
from r1pipe.config.model import ModelConfig, model_rules
from r1pipe.config.rl import RLConfig, TripwiresConfig, rl_rules, tripwire_rules
from r1pipe.config.sampler import SamplerConfig, sampler_rules
from r1pipe.config.stages import (
    DistillConfig,
    EvaluateConfig,
    FineTuneConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
    StageConfig,
    optim_rules,
    retention_rules,
)
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.types import GENERAL_TASKS

SPECIAL = "<｜"  # how r1pipe's special tokens begin
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
    model: Annotated[ModelConfig | HFConfig, PlainValidator(build_model)]
    data: DataConfig
    chat: ChatConfig
    engine: EngineConfig
    sampler: SamplerConfig  # of engine.sampler=vllm
    stage: Annotated[StageConfig, PlainValidator(build_stage)]
    recipe: RecipeConfig
    tracking: TrackingConfig
    tripwires: TripwiresConfig  # of reinforcement
    weights_from: ParentRef | None  # filled at launch
    reads_from: dict[str, ParentRef]  # filled at launch: stage name -> checkpoint


def check(config: RunConfig) -> None:
    """Raises ConfigError on the first rule that does not hold; each can rely on those before it."""
    if not config.root.strip():
        raise ConfigError("root is empty; give root=DIR, where run folders go")
    rules = (
        shape_rules(config),
        data_rules(config.data),
        chat_rules(config.chat),
        engine_rules(config.engine),
        hosts_rules(config.engine),
        sampler_precision_rules(config.engine),
        sampler_rules(config.sampler, config.engine),
        optim_rules(config.stage.optim),
        length_rules(config),
        retention_rules(config.stage),
        stage_rules(config),
        mixture_rules(config.stage, config.data),
        tracking_rules(config.tracking),
        tripwire_rules(config.tripwires),
    )
    check_all(chain(*rules))


def shape_rules(config: RunConfig) -> Rules:
    """Of the model, and of the engine and the stage with it."""
    if isinstance(config.model, HFConfig):
        yield from hf_rules(config.model, config.engine, config.stage)
    else:
        yield from model_rules(config.model)
        yield from equal_rules(config.engine, config.model)
        yield from expert_rules(config.engine, config.model)
        yield from pipeline_rules(config.engine, config.model)
        yield from passes_rules(config.stage, config.engine)
        yield from replay_rules(config.stage, config.engine, config.model)
        yield from fp8_rules(config.engine, config.model)


def passes_rules(stage: StageConfig, engine: EngineConfig) -> Rules:
    """The passes of some models are in one piece."""
    whole = {
        "stage=reward_model": isinstance(stage, RewardModelConfig),
        "stage.ppo": isinstance(stage, RLConfig) and stage.ppo is not None,
    }
    for what, is_here in whole.items():
        if is_here and engine.pipeline > 1:
            yield f"{what} needs engine.pipeline=1: a scalar model is not cut into parts"


def replay_rules(stage: StageConfig, engine: EngineConfig, model: ModelConfig) -> Rules:
    if not isinstance(stage, RLConfig) or not stage.replay_routing:
        return
    if model.first_k_dense_replace >= model.num_hidden_layers:
        yield f"stage.replay_routing=true: model={model.name} has no experts; drop it"
    if str(engine.sampler) == "transformers":
        yield (
            "stage.replay_routing=true needs a sampler that records experts (engine.sampler=bundled or "
            "vllm), which transformers does not"
        )


def tracking_rules(tracking: TrackingConfig) -> Rules:
    """What MLflow would refuse, partly at the end of a run, when it registers the checkpoint."""
    name = tracking.model_name
    if name.strip() in ("", ".", "..") or set("/:") & set(name):
        yield f"tracking.model_name={name} must be a name without / and :, and not empty"
    if not tracking.experiment.strip():
        yield "tracking.experiment must not be empty"


def chat_rules(chat: ChatConfig) -> Rules:
    """How long a system prompt may be is checked with the tokenizer, by the job."""
    if chat.system and not chat.system.strip():
        yield 'chat.system is blank; give a text, or chat.system="" for no system prompt'
    if chat.system and SPECIAL in chat.system:
        yield f"chat.system has the sign {SPECIAL} of a special token; remove it"


def length_rules(config: RunConfig) -> Rules:
    """Nothing may be longer than the model's context."""
    stage, longest = config.stage, config.model.max_position_embeddings
    lengths = {"stage.eval.max_tokens": stage.eval.max_tokens}
    if isinstance(stage, PretrainConfig | FineTuneConfig):
        lengths["stage.sequence_length"] = stage.sequence_length
    if isinstance(stage, RejectionConfig | RLConfig):
        lengths["stage.sampling.max_tokens"] = stage.sampling.max_tokens
    for key, length in lengths.items():
        if length > longest:
            yield f"{key}={length} is longer than model.max_position_embeddings={longest}"


def stage_rules(config: RunConfig) -> Rules:
    stage, ranks = config.stage, config.engine.ranks
    if not re.fullmatch(r"\w+\.py", stage.script):
        yield f"{stage.script=!s} must be the name of a script in stages/, not a path"
    yield from spread_rules(stage, ranks, f"engine.ranks={ranks}")
    if isinstance(stage, PretrainConfig):
        if stage.max_steps == 0:
            yield "stage.max_steps=0: the corpus is endless; say how many"
        if config.data.kind != WITH_DOCUMENTS:
            yield f"data={config.data.name} has no documents for stage={stage.name}; use data=world"
    if isinstance(stage, RejectionConfig | RLConfig) and stage.sampling.top_p == 0:
        yield "stage.sampling.top_p=0 leaves nothing to draw; it must be above 0"
    if stage.name == "evaluate" and config.parent is None:
        yield "stage=evaluate needs parent=CHECKPOINT; or use `r1pipe eval CHECKPOINT`"


def spread_rules(stage: StageConfig, ranks: int, told: str) -> Rules:
    """What all of so many ranks have the same number of."""
    if isinstance(stage, PretrainConfig | FineTuneConfig | RewardModelConfig) and stage.batch_size % ranks:
        yield f"{stage.batch_size=} must be a multiple of {told}"
    if isinstance(stage, RLConfig):
        yield from rl_rules(stage, ranks)


def mixture_rules(stage: StageConfig, data: DataConfig) -> Rules:
    if isinstance(stage, SFTConfig):
        yield from share_rules("stage.styles", stage.styles, data, STYLES)
    if isinstance(stage, RejectionConfig):
        yield from share_rules("stage.general_kinds", stage.general_kinds, data, GENERAL_TASKS)
    if isinstance(stage, RLConfig) and stage.preference:
        kinds = stage.preference.general_kinds
        yield from share_rules("stage.preference.general_kinds", kinds, data, GENERAL_TASKS)


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
    return load(mapping)


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The config as it is written to config.json."""
    return asdict(config)
