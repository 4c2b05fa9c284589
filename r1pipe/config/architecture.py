"""What must be true of a model's shape: asked at composition, and again of every model that is built.

No torch here: the command line asks too.
"""

from collections.abc import Iterator

from r1pipe.config.parts import ModelConfig
from r1pipe.core.errors import ConfigError

Rules = Iterator[tuple[bool, str]]  # what must hold, and the message where it does not

SCORES = {"noaux_tc": "sigmoid", "group_limited_greedy": "softmax", "greedy": "softmax"}  # by topk_method
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group"),
    *("topk_group", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "max_position_embeddings",
)


def check_all(rules: Rules) -> None:
    """Raises ConfigError, one line that names the key, on the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError on the first rule of a model's shape that does not hold."""
    check_all(model_rules(model))


def model_rules(model: ModelConfig) -> Rules:
    """The rules in an order in which each can rely on those before it."""
    for key in AT_LEAST_ONE:
        yield getattr(model, key) >= 1, f"model.{key}={getattr(model, key)} must be 1 or more"
    yield (
        model.q_lora_rank is None or model.q_lora_rank >= 1,
        f"model.q_lora_rank={model.q_lora_rank} must be 1 or more, or null for one full projection",
    )
    yield (
        model.num_nextn_predict_layers >= 0,
        f"model.num_nextn_predict_layers={model.num_nextn_predict_layers} must be 0 or more",
    )
    yield (
        0 <= model.first_k_dense_replace <= model.num_hidden_layers,
        f"model.first_k_dense_replace={model.first_k_dense_replace} must be from 0 to "
        f"model.num_hidden_layers={model.num_hidden_layers}",
    )
    yield (
        model.qk_rope_head_dim % 2 == 0,
        f"model.qk_rope_head_dim={model.qk_rope_head_dim} must be even: rotations act on pairs",
    )
    yield model.rope_theta > 1, f"model.rope_theta={model.rope_theta:g} must be above 1"
    scaling = model.rope_scaling
    yield (
        scaling is None or scaling.type == "yarn",
        f"model.rope_scaling.type={scaling.type if scaling else None} must be yarn (or rope_scaling=null)",
    )
    yield from routing_rules(model)


def routing_rules(model: ModelConfig) -> Rules:
    method, experts, groups = model.topk_method, model.n_routed_experts, model.n_group
    yield method in SCORES, f"model.topk_method={method} is none of {', '.join(SCORES)}"
    yield (
        model.scoring_func == SCORES[method],
        f"model.scoring_func={model.scoring_func} does not go with model.topk_method={method}, which takes "
        f"{SCORES[method]}",
    )
    yield (
        model.num_experts_per_tok <= experts,
        f"model.num_experts_per_tok={model.num_experts_per_tok} is more than the {experts} experts of "
        "model.n_routed_experts",
    )
    yield (
        experts % groups == 0,
        f"model.n_group={groups} must divide model.n_routed_experts={experts}",
    )
    yield (
        model.topk_group <= groups,
        f"model.topk_group={model.topk_group} is more than the groups of model.n_group={groups}",
    )
    open_experts = model.topk_group * experts // groups
    yield (
        model.num_experts_per_tok <= open_experts,
        f"model.num_experts_per_tok={model.num_experts_per_tok} is more than the {open_experts} experts in "
        f"model.topk_group={model.topk_group} groups",
    )
    yield (
        method != "noaux_tc" or model.topk_group == groups or experts // groups >= 2,
        f"model.n_group={groups} leaves one expert per group, but model.topk_method=noaux_tc "
        "ranks groups by their two best; lower n_group",
    )
