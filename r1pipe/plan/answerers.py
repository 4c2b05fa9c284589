"""Memory of the models that answer beside the one that is trained: teachers, judges, and the policy itself
where an SFT samples from it first."""

from pathlib import Path

from r1pipe.config import DistillConfig, RejectionConfig, RewardModelConfig, RunConfig
from r1pipe.config.answerer import is_server
from r1pipe.config.rl import ReinforcementConfig
from r1pipe.config.stages import SamplingConfig
from r1pipe.plan import sizes


def beside(config: RunConfig) -> float:
    """Bytes of the whole weights that stay while the stage trains, which ZeRO level 3 shares: a judge of
    reinforcement, a teacher that is read live, the first student of DPO."""
    stage, total = config.stage, 0.0
    if isinstance(stage, ReinforcementConfig) and stage.judge:
        total += _weights(config, "judge")
    if isinstance(stage, DistillConfig):
        total += _weights(config, "teacher") if is_live(stage) else 0.0
        total += _own(config) if stage.ranking and stage.ranking.loss == "dpo" else 0.0
    return total


def is_live(stage: DistillConfig) -> bool:
    """Whether the teacher is read while the student trains."""
    stored = stage.extract == "distribution" and not stage.distribution.live
    return (stage.transfer == "divergence" and not stored) or bool(stage.rl and stage.rl.teacher_coef)


def before(config: RunConfig, prompt: int) -> float:
    """Bytes of a rank before training begins: weights, which each rank gathers, and the cache of their
    answers to prompts of so many tokens. 0 where a server answers, or nobody."""
    stage, total = config.stage, 0.0
    if isinstance(stage, RejectionConfig) and config.engine.sampler == "bundled":
        total = _own(config) + cache(config, stage.sampling, prompt, stage.prompts * stage.samples_per_prompt)
    if isinstance(stage, DistillConfig) and (held := _weights(config, "teacher")):
        answers = (stage.prompts + stage.general_prompts) * stage.samples_per_prompt
        total = held + cache(config, stage.sampling, prompt, answers)
    if isinstance(stage, RejectionConfig | RewardModelConfig) and stage.judge:
        total += _weights(config, "judge")
    return total


def cache(config: RunConfig, sampling: SamplingConfig, prompt: int, answers: int) -> float:
    """Bytes of the bundled sampler's cache, by the shape of the stage's own model."""
    model, slots = config.model, min(sampling.max_num_seqs, answers)
    length = min(prompt + sampling.max_tokens, model.max_position_embeddings)
    entry = sizes.weight_bytes(config.engine.precision) * sizes.cache_entry(model)
    return float(slots * length * model.num_hidden_layers * entry)


def _weights(config: RunConfig, key: str) -> float:
    """Bytes of a teacher's or a judge's checkpoint; of one that is not known here as many as the model's."""
    named = config.teacher if key == "teacher" else config.judge
    parent = config.teacher_from if key == "teacher" else config.judge_from
    if named is None or is_server(named):
        return 0.0
    files = Path(parent.checkpoint if parent else named).glob("*.safetensors")
    return float(sum(file.stat().st_size for file in files)) or _own(config)


def _own(config: RunConfig) -> float:
    return float(sizes.weight_bytes(config.engine.precision) * sizes.parameters(config.model))
