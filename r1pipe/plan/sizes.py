"""What a model's shape says by itself: its weights, and what a token leaves behind in the layers."""

from dataclasses import dataclass, replace
from typing import Literal

from r1pipe.config import EngineConfig, HFConfig, ModelConfig

FULL, HALF = 4, 2  # bytes of float32 and of bfloat16
LOGITS_IN_MEMORY = 2**25  # elements of [N, V] in memory at once (r1pipe.model.logprobs)
LOGIT_COPIES = 3  # logits, their float32 softmax, and its gradient
Recompute = Literal["none", "selective", "full", "offload"]


def recomputation(engine: EngineConfig) -> Recompute:
    """What an engine computes again in backward."""
    return "none" if not engine.recompute else "offload" if engine.offload else "full"


def weight_bytes(precision: str) -> int:
    """Bytes of a weight in memory and on disk; with FP8, weights are stored in bfloat16."""
    return FULL if precision == "fp32" else HALF


def optimizer_bytes(precision: str, moments: str, level: int) -> int:
    """Bytes of AdamW for a weight: two moments and a float32 master, which ZeRO keeps in fp32 runs, too."""
    master = FULL if level or precision != "fp32" else 0
    return master + 2 * (FULL if moments == "fp32" else HALF)


@dataclass(frozen=True)
class States:
    """Bytes of one rank for a model that is trained."""

    weights: float
    gradients: float
    moments: float  # with the float32 masters

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments


def states(
    weights: int | float,
    trained: int | float,
    *,
    weight: int,
    gradient: int,
    optimizer: int,
    level: int,
    ranks: int,
) -> States:
    """Bytes of a rank for `weights`, of which `trained` learn, where `ranks` share them by a ZeRO level.

    `weight`, `gradient`, `optimizer`: bytes of each for one weight. With 2, 6 and 12 it is what DeepSpeed's
    estimator says for level 2 without offloading; that for level 3 counts 4 bytes of gradients, not 6.
    """
    return States(
        weight * weights / (ranks if level >= 3 else 1),
        gradient * trained / (ranks if level >= 2 else 1),
        optimizer * trained / (ranks if level >= 1 else 1),
    )


def logits(tokens: float, vocabulary: int) -> float:
    """Bytes of the head's results in a training pass of so many tokens."""
    if not vocabulary:  # a rank of a pipeline without the head
        return 0.0
    return min(tokens, max(1, LOGITS_IN_MEMORY // vocabulary)) * vocabulary * FULL * LOGIT_COPIES


def cache_entry(model: ModelConfig | HFConfig) -> int:
    """Elements that the sampler caches of a token in a layer."""
    if isinstance(model, HFConfig):
        return model.cache_width
    return model.kv_lora_rank + model.qk_rope_head_dim


def adapters(model: ModelConfig | HFConfig) -> int:
    """Number of weights of the adapters; 0 where all weights are trained."""
    return (model.lora.parameters or 0) if isinstance(model, HFConfig) else 0


def without_mtp(model: ModelConfig | HFConfig) -> int:
    if isinstance(model, HFConfig):
        return model.parameters
    return parameters(replace(model, num_nextn_predict_layers=0))


def trunk(model: ModelConfig | HFConfig) -> int:
    """Number of weights of a reward model or PPO's value model: no LM head, no multi-token prediction."""
    if isinstance(model, HFConfig):
        return model.parameters  # whether the head is tied is not known here
    return without_mtp(replace(model, tie_word_embeddings=True))


def stored(model: ModelConfig | HFConfig, recompute: Recompute, unfused: int = 0) -> int:
    """Elements that all layers store of a token for the backward pass: inputs of norms, products and SwiGLU.

    For a model of transformers as if its layers were dense, with one set of projections. `full`: each layer's
    input alone; what a layer makes anew is in `working`. `offload`: nothing, as it is on the host. `unfused`
    as in `layer_elements`.
    """
    layers = model.num_hidden_layers
    if recompute == "offload":
        return 0
    if recompute == "full":
        return layers * model.hidden_size
    dense, moe = layer_elements(model, recompute == "selective", unfused)
    first = layers if isinstance(model, HFConfig) else model.first_k_dense_replace
    return first * dense + (layers - first) * moe


def working(model: ModelConfig | HFConfig, recompute: Recompute, unfused: int = 0) -> int:
    """Elements of a token in the layer that is computed anew: what it keeps, and the gradients of that. With
    `offload` in the larger half of one, with the inputs of two."""
    if recompute == "none":
        return 0
    if recompute == "offload" and isinstance(model, ModelConfig):
        attention = attention_elements(model)
        rest = max(layer_elements(model, False)) - attention + 2 * model.hidden_size
        return 2 * max(attention, rest) + 2 * model.hidden_size
    return 2 * max(layer_elements(model, False, unfused))


def layer_elements(model: ModelConfig | HFConfig, selective: bool, unfused: int = 0) -> tuple[int, int]:
    """Elements that a dense layer and a MoE layer store of a token.

    `selective`: without those of `recomputed`, and without the experts' results, as their routing weights
    multiply what comes before the down-projection (Megatron's way). `unfused`: the tokens that a row attends
    to, where a CPU runs torch's operators one by one in place of the compiled kernels; else 0.
    """
    if isinstance(model, HFConfig):
        # of two norms the input, that normalised, and the result; queries, attention's result, and that put
        # together; keys and values; gate, its SiLU, up, and their product
        layer = 9 * model.hidden_size + model.cache_width + 4 * model.intermediate_size
        return layer, layer
    if unfused and not selective:
        return unfused_elements(model, unfused)
    d, experts, attention = model.hidden_size, visited(model), attention_elements(model)
    dense = attention + 3 * model.intermediate_size
    moe = attention + experts * (3 * model.moe_intermediate_size + 2 * d) + model.n_routed_experts
    if selective:
        again = recomputed(model)
        return dense - again[0], moe - again[1] - experts * d
    return dense, moe


def unfused_elements(model: ModelConfig, row: int) -> tuple[int, int]:
    """Of torch's operators on a CPU, as autograd keeps them: norms also their normalised input; attention its
    values as wide as its keys, its result once more as the output projection reads it, and in each layer a
    mask of numbers over the `row`; SwiGLU also gate after SiLU; experts their results before they are summed.
    """
    d, heads, value = model.hidden_size, model.num_attention_heads, model.v_head_dim
    key, experts = model.qk_nope_head_dim + model.qk_rope_head_dim, model.num_experts_per_tok
    values = 2 * key if key > value else model.qk_nope_head_dim + 2 * value
    latents = 3 * (model.q_lora_rank or 0) + 3 * model.kv_lora_rank + model.qk_rope_head_dim
    attention = 6 * d + heads * (2 * key + values + value + 1) + latents + row
    inner, shared = model.moe_intermediate_size, model.n_shared_experts
    moe = experts * (2 * d + 5 * inner) + 4 * shared * inner + model.n_routed_experts
    return attention + 4 * model.intermediate_size, attention + moe


def attention_elements(model: ModelConfig) -> int:
    """Of those, the ones outside the SwiGLU or the experts."""
    key, heads = model.qk_nope_head_dim + model.qk_rope_head_dim, model.num_attention_heads
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    return 4 * model.hidden_size + heads * (2 * key + 2 * model.v_head_dim) + latents


def recomputed(model: ModelConfig) -> tuple[int, int]:
    """Elements of a token in a dense and a MoE layer that DeepSeek-V3 computes again (section 3.2.3): the
    outputs of norms, of up-projections (all heads' queries, keys and values) and of SwiGLU."""
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    attention = 2 * model.hidden_size + model.num_attention_heads * (2 * key + model.v_head_dim)
    experts = visited(model) * model.moe_intermediate_size
    return attention + model.intermediate_size, attention + experts


def in_eight_bits(model: ModelConfig) -> int:
    """Elements of a token in all layers that DeepSeek-V3 keeps in FP8 (section 3.3.3): inputs of SwiGLU and
    of the experts."""
    first, experts = model.first_k_dense_replace, visited(model)
    moe = experts * (2 * model.moe_intermediate_size + model.hidden_size)
    return first * 2 * model.intermediate_size + (model.num_hidden_layers - first) * moe


def visited(model: ModelConfig) -> int:
    """Experts that a token visits in a layer."""
    return model.num_experts_per_tok + model.n_shared_experts


@dataclass(frozen=True)
class Weights:
    """Number of weights by place; norms (thousands at most) are left out."""

    attention: int  # of one layer
    up_projections: int  # of those, what `selective` multiplies by again: from latents to all heads
    dense: int  # of one dense layer's SwiGLU
    expert: int  # of one expert
    gate: int  # of one layer
    vocabulary: int  # of the head, and of the embedding
    joining: int  # of one multi-token prediction layer, besides its decoder layer

    @classmethod
    def of(cls, model: ModelConfig) -> "Weights":
        d, heads = model.hidden_size, model.num_attention_heads
        query_width = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        up = 0 if model.q_lora_rank is None else model.q_lora_rank * query_width
        query = d * query_width if model.q_lora_rank is None else d * model.q_lora_rank
        latent = d * (model.kv_lora_rank + model.qk_rope_head_dim)
        up += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
        return cls(
            query + latent + up + heads * model.v_head_dim * d,
            up,
            3 * d * model.intermediate_size,
            3 * d * model.moe_intermediate_size,
            d * model.n_routed_experts,
            model.vocab_size * d,
            2 * d * d,
        )


def moe_layers(model: ModelConfig) -> int:
    """MoE layers, those of multi-token prediction included."""
    return model.num_hidden_layers - model.first_k_dense_replace + model.num_nextn_predict_layers


def routed(model: ModelConfig) -> int:
    """Number of weights of all routed experts: what expert parallelism spreads."""
    return moe_layers(model) * model.n_routed_experts * Weights.of(model).expert


def parameters(model: ModelConfig | HFConfig) -> int:
    """Number of weights, embeddings and head included; without norms (thousands at most)."""
    if isinstance(model, HFConfig):
        return model.parameters
    one, moe = Weights.of(model), moe_layers(model)
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    return (
        one.vocabulary * (1 if model.tie_word_embeddings else 2)
        + layers * one.attention
        + model.first_k_dense_replace * one.dense
        + moe * (model.n_shared_experts * one.expert + one.gate)
        + model.num_nextn_predict_layers * one.joining
        + routed(model)
    )
