"""Operations of a model on paper, and what a measured time is worth. Plain numbers, no torch.

Only matrix products count, two operations for a multiplication with its addition, and only those that are
needed: what is recomputed, padded or computed for every expert makes a contestant slower, not busier.
"""

from r1pipe.bench.config import Case
from r1pipe.config import ModelConfig

# Operations per second of dense bfloat16 products by NVIDIA's data sheets, which give them with sparsity: the
# double. Names are the driver's, of the SXM modules.
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def data_sheet(gpu: str) -> dict[str, float]:
    """What the data sheet promises by dtype, as far as it is known here."""
    return {"bf16": DATA_SHEETS[gpu]} if gpu in DATA_SHEETS else {}


def weights_per_token(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: active experts alone, the head, not the embedding."""
    width, heads = config.hidden_size, config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is None:
        queries = width * heads * query
    else:
        queries = config.q_lora_rank * (width + heads * query)
    latent = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    expanded = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = queries + latent + expanded + heads * config.v_head_dim * width
    experts = config.num_experts_per_tok + config.n_shared_experts
    sparse = width * config.n_routed_experts + experts * 3 * width * config.moe_intermediate_size
    dense = 3 * width * config.intermediate_size
    first = config.first_k_dense_replace
    layers = config.num_hidden_layers
    return layers * attention + first * dense + (layers - first) * sparse + width * config.vocab_size


def forward_flops(config: ModelConfig, begin: int, end: int) -> int:
    """Operations of the tokens at places [begin, end) of one sequence, each looking at all up to itself."""
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * per_head
    pairs = (end * (end + 1) - begin * (begin + 1)) // 2
    return 2 * weights_per_token(config) * (end - begin) + per_pair * pairs


def case_flops(config: ModelConfig, case: Case) -> int:
    """Operations of a case: a backward pass counts twice a forward; grpo reads each prompt once per pass and
    passes over its completions five times (sampling, reference, forward, backward)."""
    if case.kind == "train":
        return 3 * case.sequences * forward_flops(config, 0, case.prompt)
    prompts = case.sequences // case.group * forward_flops(config, 0, case.prompt)
    completions = case.sequences * forward_flops(config, case.prompt, case.prompt + case.new)
    return (5 if case.kind == "grpo" else 1) * (prompts + completions)


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of `peak` (operations per second) that the work's own need is."""
    return flops / seconds / peak


def speedup(ours: float, theirs: float) -> float:
    """How many times faster ours is, from seconds for the same work."""
    return theirs / ours
