"""What a case needs at least: operations and bytes, and from them the roofline's time. Imports no torch.

Of a model's operations only matrix products count, two for a multiplication with its addition, and only
those that are needed: what is recomputed, padded or computed for every expert makes a contestant slower, not
busier.
"""

from bench.config import Case, Shape
from bench.turns import lengths
from r1pipe.config import ModelConfig

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
ADAMW = (
    7 * 4
)  # bytes of a weight in a step: weight, gradient and two moments read, all but the gradient written
PASSES = {"train": 3, "grpo": 5, "update": 4, "sample": 1}  # over a token; a backward pass counts as two


def weights_per_token(shape: Shape) -> int:
    """Weights that one token is multiplied with: active experts alone, the head, not the embedding."""
    return _weights(shape, shape.num_experts_per_tok if isinstance(shape, ModelConfig) else 0)


def all_weights(shape: Shape) -> int:
    """The same with every routed expert: what a pass over many tokens reads."""
    return _weights(shape, shape.n_routed_experts if isinstance(shape, ModelConfig) else 0)


def _weights(shape: Shape, routed: int) -> int:
    width, heads, layers = shape.hidden_size, shape.num_attention_heads, shape.num_hidden_layers
    dense, head = 3 * width * shape.intermediate_size, width * shape.vocab_size
    if not isinstance(shape, ModelConfig):
        attention = 2 * width * shape.head_dim * (heads + shape.num_key_value_heads)
        return layers * (attention + dense) + head
    query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    if shape.q_lora_rank is None:
        queries = width * heads * query
    else:
        queries = shape.q_lora_rank * (width + heads * query)
    latent = width * (shape.kv_lora_rank + shape.qk_rope_head_dim)
    expanded = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    attention = queries + latent + expanded + heads * shape.v_head_dim * width
    experts = routed + shape.n_shared_experts
    sparse = width * shape.n_routed_experts + experts * 3 * width * shape.moe_intermediate_size
    first = shape.first_k_dense_replace
    return layers * attention + first * dense + (layers - first) * sparse + head


def forward_flops(shape: Shape, begin: int, end: int) -> int:
    """Operations of the tokens at places [begin, end) of one sequence, each looking at all up to itself."""
    if isinstance(shape, ModelConfig):
        per_head = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    else:
        per_head = 2 * shape.head_dim
    per_pair = 2 * shape.num_hidden_layers * shape.num_attention_heads * per_head
    pairs = (end * (end + 1) - begin * (begin + 1)) // 2
    return 2 * weights_per_token(shape) * (end - begin) + per_pair * pairs


def case_flops(shape: Shape, case: Case) -> int:
    """Operations of a case: a backward pass counts twice a forward; a group's prompt is read once per pass.
    grpo passes over its completions five times (sampling, reference, forward, backward), update four."""
    if case.kind == "train":
        return PASSES["train"] * case.sequences * forward_flops(shape, 0, case.prompt)
    prompts = case.sequences // case.group * forward_flops(shape, 0, case.prompt)
    completions = sum(forward_flops(shape, case.prompt, case.prompt + new) for new in new_tokens(case))
    return PASSES[case.kind] * (prompts + completions)


def case_bytes(shape: Shape, case: Case, dtype: str) -> int:
    """Bytes that must come from or go to memory: while sampling, all weights for each token of the sequences
    and the keys and values that it attends to; in training, AdamW's step. Activations may stay in caches."""
    size, steps = BYTES[dtype], case.new if case.kind in ("sample", "grpo") else 0
    if isinstance(shape, ModelConfig):
        per_token = shape.kv_lora_rank + shape.qk_rope_head_dim
    else:
        per_token = 2 * shape.num_key_value_heads * shape.head_dim
    seen = steps * case.prompt + steps * (steps + 1) // 2
    read = steps * all_weights(shape) + case.sequences * seen * shape.num_hidden_layers * per_token
    return read * size + (0 if case.kind == "sample" else ADAMW * all_weights(shape))


def new_tokens(case: Case) -> list[int]:
    """Tokens of each completion."""
    return lengths(case.sequences, case.new) if case.kind == "update" else [case.new] * case.sequences


def roofline(shape: Shape, case: Case, dtype: str, peak: float, bandwidth: float) -> float:
    """The least seconds of a case (Williams et al., 2009, of all its operations and bytes together).

    `peak` in operations per second, `bandwidth` in bytes per second: the longer of the two decides.
    """
    return max(case_flops(shape, case) / peak, case_bytes(shape, case, dtype) / bandwidth)
