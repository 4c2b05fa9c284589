"""AdamW, its learning rate schedule, and DeepSpeed's settings."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_update

from r1pipe.config import EngineConfig, OptimConfig

PIECE = 2**24  # elements converted to float32 at a time
MOMENTS = ("exp_avg", "exp_avg_sq")
ALL = 2**62
PARTS = 4  # of a share
LIMITS = {  # DeepSpeed's own, in elements
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_model_persistence_threshold": ALL,
}
NEVER = 10**12  # steps between DeepSpeed's own reports: ours are in metrics.jsonl


def lr_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate by step: linear warm-up, then the schedule down to `min_lr`."""
    floor = config.min_lr / config.lr

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
        left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return floor + (1 - floor) * left

    return factor


def deepspeed_config(config: EngineConfig, grad_clip: float, share: int = ALL) -> dict[str, Any]:
    """`share`: how many weights this rank has at ZeRO level 3. What it gathers ahead, keeps whole and reduces
    at a time is at most a part of that; DeepSpeed's own limits would let it have all of a small model."""
    zero: dict[str, Any] = {"stage": config.zero_level, "overlap_comm": False}
    if config.zero_level == 3:
        zero |= {name: min(limit, max(1, share // PARTS)) for name, limit in LIMITS.items()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop's shares of the loss add up
        "managed_gradient_accumulation": False,  # step() is the boundary, after any number of backward()
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision != "fp32"},
        "data_types": {"grad_accum_dtype": "fp32"},  # micro-batches add up in float32
        "steps_per_print": NEVER,
    }


def adamw(model: nn.Module, config: OptimConfig, moments: str) -> torch.optim.AdamW:
    """Weight decay on matrices only, not norms and biases. `moments`: their type, "fp32" or "bf16".

    Experts that ranks share out are a group of their own, which DeepSpeed finds by `moe` and `name`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    shared_out = [p for p in parameters if is_shared_out(p)]
    matrices = [p for p in parameters if _dims(p) >= 2 and not is_shared_out(p)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if _dims(p) < 2], "weight_decay": 0.0},
    ]
    if shared_out:
        name = getattr(shared_out[0], "group_name")  # noqa: B009
        groups.append({"params": shared_out, "weight_decay": config.weight_decay, "moe": True, "name": name})
    betas = (config.betas[0], config.betas[1])
    kind = AdamW16 if moments == "bf16" else torch.optim.AdamW
    return kind([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _dims(parameter: Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # at ZeRO level 3 it may be flat


def is_shared_out(parameter: Tensor) -> bool:
    """Whether ranks have different parts of it: expert parallelism, by DeepSpeed's mark."""
    return not getattr(parameter, "allreduce", True)


def is_trained(parameter: Tensor) -> bool:
    """Whether this rank trains it, or another one of its pipeline."""
    return parameter.requires_grad or getattr(parameter, "trained_elsewhere", False)


def copy_moments(optimizer: Any) -> None:
    """Give a DeepSpeed optimizer that has read mapped files moments of its own, in their own type."""
    adamw = getattr(optimizer, "optimizer", optimizer)
    for state in adamw.state.values():
        for name in MOMENTS:
            if name in state:
                kind = torch.bfloat16 if isinstance(adamw, AdamW16) else state[name].dtype
                state[name] = state[name].to(kind, copy=True)


class AdamW16(torch.optim.AdamW):
    """AdamW with moments stored in bfloat16 (V3 section 3.3.3): updates in float32, rounds to nearest."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS}
        for name in MOMENTS:  # torch casts a loaded state to the parameter's type
            state[name] = state[name].bfloat16()
        flat = [t.view(-1) for t in (parameter, parameter.grad, *(state[name] for name in MOMENTS))]
        for weight, gradient, *kept in zip(*(t.split(PIECE) for t in flat), strict=True):
            first, second = (moment.float() for moment in kept)
            adamw_update(
                *([weight], [gradient], [first], [second], [], [state["step"].clone()]),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            kept[0].copy_(first)
            kept[1].copy_(second)
        state["step"] += 1
