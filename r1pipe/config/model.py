"""The model's shape, and what must hold of it: checked at composition, and of every model that is built."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pydantic import Field

from r1pipe.config.fields import Count, NonNegative, Positive, Rules, Strict, build, check_all

SCORES = {"noaux_tc": "sigmoid", "group_limited_greedy": "softmax", "greedy": "softmax"}  # by topk_method


@dataclass
class RopeScaling(Strict):
    """YaRN, under transformers' names (V3 section 4.3); absent when positions are not scaled."""

    type: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]  # how many times longer than the original context
    original_max_position_embeddings: Positive  # the context of pre-training
    beta_fast: NonNegative  # rotations above which a dimension is left as it is
    beta_slow: NonNegative  # rotations below which a dimension is interpolated
    mscale: NonNegative  # attention temperature of the cos/sin tables
    mscale_all_dim: NonNegative  # attention temperature of the softmax scale


@dataclass
class ModelConfig(Strict):
    """DeepSeek-V3's architecture under the published config.json names (V3 section 2.1)."""

    name: str  # the file in conf/model/
    vocab_size: Positive  # rows of the embedding; at least the tokenizer's size
    hidden_size: Positive  # width of the residual stream
    intermediate_size: Positive  # width of the dense layers' SwiGLU
    moe_intermediate_size: Positive  # width of one routed expert
    num_hidden_layers: Positive  # decoder layers, dense and MoE
    num_attention_heads: Positive  # MLA heads
    n_shared_experts: Count  # experts that every token visits
    n_routed_experts: Positive  # experts that the gate chooses among
    num_experts_per_tok: Positive  # routed experts a token visits (top-k)
    n_group: Positive  # groups (nodes) of experts
    topk_group: Positive  # groups a token may visit
    first_k_dense_replace: Count  # first layers that have a dense MLP instead of experts
    norm_topk_prob: bool  # whether the chosen experts' weights are normalised to sum 1
    scoring_func: Literal["sigmoid", "softmax"]  # V3: sigmoid; V2: softmax
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"]  # V3: the first; V2: the others
    routed_scaling_factor: NonNegative  # factor on the routed experts' weights
    q_lora_rank: Positive | None  # rank of the query compression; null: one full projection
    kv_lora_rank: Positive  # width of the latent that the cache holds
    qk_nope_head_dim: Positive  # width per head without position
    qk_rope_head_dim: Positive  # width of the decoupled rotary part, shared by all heads in the key
    v_head_dim: Positive  # width per head of the values
    max_position_embeddings: Positive  # longest sequence
    rope_theta: NonNegative  # base of the rotary frequencies
    rope_scaling: RopeScaling | None  # YaRN, or null
    rms_norm_eps: NonNegative  # epsilon of the layers' norms (the latent norms always use 1e-6)
    initializer_range: NonNegative  # standard deviation of the initial weights
    tie_word_embeddings: bool  # whether the head shares the embedding
    num_nextn_predict_layers: Count  # multi-token prediction layers, each one token further (V3 section 2.2)


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError on the first bound or rule of a model's shape that does not hold."""
    build(ModelConfig, asdict(model), "model")
    check_all(model_rules(model))


def model_rules(model: ModelConfig) -> Rules:
    """The rules in an order in which each can rely on those before it."""
    if model.first_k_dense_replace > model.num_hidden_layers:
        yield f"{model.first_k_dense_replace=} must be from 0 to {model.num_hidden_layers=}"
    if model.qk_rope_head_dim % 2:
        yield f"{model.qk_rope_head_dim=} must be even: rotations act on pairs"
    if model.rope_theta <= 1:
        yield f"{model.rope_theta=:g} must be above 1"
    method, experts, groups = model.topk_method, model.n_routed_experts, model.n_group
    if model.scoring_func != SCORES[method]:
        yield f"{model.scoring_func=!s} does not go with {model.topk_method=!s}, which takes {SCORES[method]}"
    chosen = f"{model.num_experts_per_tok=}"
    if model.num_experts_per_tok > experts:
        yield f"{chosen} is more than the {experts} experts of model.n_routed_experts"
    if experts % groups:
        yield f"{model.n_group=} must divide {model.n_routed_experts=}"
    if model.topk_group > groups:
        yield f"{model.topk_group=} is more than the groups of {model.n_group=}"
    open_experts = model.topk_group * experts // groups
    if model.num_experts_per_tok > open_experts:
        yield f"{chosen} is more than the {open_experts} experts in {model.topk_group=} groups"
    if method == "noaux_tc" and model.topk_group < groups and experts // groups < 2:
        yield (
            f"{model.n_group=} leaves one expert per group, but model.topk_method=noaux_tc "
            "ranks groups by their two best; lower n_group"
        )
