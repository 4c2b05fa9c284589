"""Model shapes small enough for every test, and models of them with random weights."""

import dataclasses

import torch

from r1pipe.config import ModelConfig, RopeScaling
from r1pipe.model import DeepseekV3
from r1pipe.model.moe import gates

YARN = RopeScaling("yarn", 40.0, 64, 32.0, 1.0, 1.0, 1.0)


def tiny(**changes) -> ModelConfig:
    """A V3-like shape small enough for every test: groups, query compression, one dense layer."""
    values = {
        "name": "tiny",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "max_position_embeddings": 2560,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    }
    return ModelConfig(**{**values, **changes})


SHAPES = {
    "v3": tiny(),
    "v3_groups": tiny(  # V3's own: 8 groups, of which 4 are kept, and 8 experts a token; three dense layers
        n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=8, num_hidden_layers=5,
        first_k_dense_replace=3, rms_norm_eps=1e-6, initializer_range=0.12,
    ),
    "moonlight": tiny(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rope_theta=50000.0),
    "v3_yarn": tiny(rope_scaling=YARN),
    "yarn_mscale": tiny(rope_scaling=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.5)),
    "few_experts": tiny(n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1),
    "tied": tiny(tie_word_embeddings=True),
}  # fmt: skip
V2_SHAPES = {
    "v2_lite": tiny(
        q_lora_rank=None, n_group=1, topk_group=1, scoring_func="softmax", topk_method="greedy",
        norm_topk_prob=False, routed_scaling_factor=1.0, rope_scaling=dataclasses.replace(YARN, mscale=0.707),
    ),
    "v2": tiny(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
}  # fmt: skip


def ours(config: ModelConfig) -> DeepseekV3:
    """Random weights, norms and biases too, the latter of both signs and large enough to change choices."""
    generator = torch.Generator().manual_seed(7)
    model = DeepseekV3(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2, generator=generator)
        for gate in gates(model):
            if config.topk_method == "noaux_tc":
                gate.e_score_correction_bias.normal_(-0.2, 0.5, generator=generator)
    return model


def tokens(rows: int, length: int, config: ModelConfig) -> torch.Tensor:
    return torch.randint(1, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
