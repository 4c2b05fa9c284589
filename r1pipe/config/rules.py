"""What must hold across the fields of a config: `check` asks every rule."""

import re
from dataclasses import replace
from itertools import chain

from r1pipe.config.benchmark import benchmark_rules, task_of
from r1pipe.config.data import STYLES, DataConfig, data_rules, share_rules
from r1pipe.config.distill import DistillConfig, distill_rules
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
from r1pipe.config.fields import Rules, check_all
from r1pipe.config.hf import HFConfig, hf_rules
from r1pipe.config.judge import REWARDS, judge_rules
from r1pipe.config.model import ModelConfig, model_rules
from r1pipe.config.rl import RLConfig, rl_rules, tripwire_rules
from r1pipe.config.run import WITH_DOCUMENTS, ChatConfig, RunConfig, TrackingConfig
from r1pipe.config.sampler import sampler_rules
from r1pipe.config.screening import screening_rules
from r1pipe.config.stages import (
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
from r1pipe.config.transfer import as_rl, below_rl, samplings
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import GENERAL_TASKS

SPECIAL = "<｜"  # how r1pipe's special tokens begin


def check(config: RunConfig) -> None:
    """Raises ConfigError on the first rule that does not hold; each can rely on those before it."""
    if not config.root.strip():
        raise ConfigError("root is empty; give root=DIR, where run folders go")
    rules = (
        shape_rules(config),
        benchmark_rules(config.benchmark, config.stage),
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
        distill_rules(config.stage, config.teacher, config.engine.ranks),
        judge_stage_rules(config),
        tracking_rules(config.tracking),
        tripwire_rules(config.tripwires),
        screening_rules(config.screening),
    )
    check_all(chain(*rules))


def shape_rules(config: RunConfig) -> Rules:
    """Of the model, and of the engine and the stage with it."""
    stage = config.stage
    if isinstance(stage, DistillConfig) and stage.rl:
        yield from below_rl(_shape_rules(replace(config, stage=as_rl(stage))))
    else:
        yield from _shape_rules(config)


def _shape_rules(config: RunConfig) -> Rules:
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
    if isinstance(stage, RejectionConfig | RLConfig) or (isinstance(stage, DistillConfig) and config.teacher):
        lengths["stage.sampling.max_tokens"] = stage.sampling.max_tokens
    lengths |= {f"{key}.max_tokens": sampling.max_tokens for key, sampling in samplings(stage).items()}
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


def spread_rules(stage: StageConfig, ranks: int, divisor: str) -> Rules:
    """What all of so many ranks have the same number of."""
    if isinstance(stage, PretrainConfig | FineTuneConfig | RewardModelConfig) and stage.batch_size % ranks:
        yield f"{stage.batch_size=} must be a multiple of {divisor}"
    if isinstance(stage, RLConfig):
        yield from rl_rules(stage, ranks)


def judge_stage_rules(config: RunConfig) -> Rules:
    """Of the judge, and of the rewards that it gives."""
    stage = config.stage
    if not isinstance(stage, RLConfig | EvaluateConfig | RejectionConfig | RewardModelConfig):
        return
    yield from judge_rules(config.judge, stage.judge, config.engine.zero_level)
    if isinstance(stage, EvaluateConfig) and config.judge is not None:
        yield from judged_answers_rules(config)
    if isinstance(stage, RLConfig):
        weighed = [name for name in REWARDS if stage.rewards.weights.get(name)]
        if weighed and config.judge is None:
            yield f"stage.rewards.weights.{weighed[0]} needs judge=MODEL"
        if config.judge is not None and not weighed:
            yield "judge=MODEL earns nothing in this stage; give +stage.rewards.weights.judge=1"
        if weighed and stage.preference is None:
            yield (
                f"stage.rewards.weights.{weighed[0]}: a judge scores general prompts, of which "
                f"stage={stage.name} has none; take stage=all_scenario"
            )


def judged_answers_rules(config: RunConfig) -> Rules:
    """What a judge of a checkpoint's answers is given to judge."""
    if task := task_of(config.benchmark):
        yield (
            f"judge=MODEL has nothing to judge with benchmark=lm_eval/{task}, which scores its own samples; "
            "run it without benchmark="
        )
    elif config.benchmark and config.stage.eval.general == 0:
        yield (
            f"judge=MODEL rates answers to general prompts, and benchmark={config.benchmark.name} asks none; "
            "give stage.eval.general above 0, or leave judge out"
        )


def mixture_rules(stage: StageConfig, data: DataConfig) -> Rules:
    if isinstance(stage, SFTConfig):
        yield from share_rules("stage.styles", stage.styles, data, STYLES)
    if isinstance(stage, RejectionConfig | DistillConfig):
        yield from share_rules("stage.general_kinds", stage.general_kinds, data, GENERAL_TASKS)
    if isinstance(stage, RLConfig) and stage.preference:
        kinds = stage.preference.general_kinds
        yield from share_rules("stage.preference.general_kinds", kinds, data, GENERAL_TASKS)
