"""The bundled DeepSeek-V3 model: build it, balance its router, load and save it."""

from r1pipe.model.moe import Balance, expert_loads, max_vio, reset_loads, update_router_bias
from r1pipe.model.names import model_config_from
from r1pipe.model.training import set_recompute, train_as
from r1pipe.model.transformer import DeepseekV3
from r1pipe.model.weights import load_pretrained, save_pretrained

__all__ = [
    "Balance",
    "DeepseekV3",
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
