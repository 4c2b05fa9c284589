"""The models: the bundled DeepSeek-V3 and those of transformers; build, balance, load and save them."""

from r1pipe.model.moe import Balance, expert_loads, max_vio, reset_loads, update_router_bias
from r1pipe.model.names import model_config_from
from r1pipe.model.policy import Policy, load_pretrained
from r1pipe.model.saving import save_pretrained
from r1pipe.model.training import set_recompute, train_as
from r1pipe.model.transformer import DeepseekV3

__all__ = [
    "Balance",
    "DeepseekV3",
    "Policy",
    "expert_loads",
    "load_pretrained",
    "max_vio",
    "model_config_from",
    "reset_loads",
    "save_pretrained",
    "set_recompute",
    "train_as",
    "update_router_bias",
]
