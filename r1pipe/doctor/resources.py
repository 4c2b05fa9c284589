"""Device, memory and disk: what the run will need at most, and what is free."""

import psutil
import torch

from r1pipe.config import RewardModelConfig, RLConfig, StageConfig
from r1pipe.doctor.context import Context, Outcome
from r1pipe.plan import footprint
from r1pipe.plan.footprint import Need, mib
from r1pipe.runs import machine
from r1pipe.runs.findings import FAIL, PASS


def device(context: Context) -> Outcome:
    probed = f"{context.run.world_size} of {context.config.engine.ranks} ranks tested"
    if context.device.type == "cuda":
        return Outcome(PASS, f"{torch.cuda.get_device_name(context.device)}, {probed}")
    return Outcome(PASS, f"{context.device.type}, {machine.cores()} cores, {probed}")


def memory(context: Context) -> Outcome:
    """The estimated peak of one rank against the memory that is free for it."""
    longest = 0
    if isinstance(context.config.stage, RLConfig):
        prompts = [*context.prompts, *context.general]
        longest = max((len(context.chat.prompt_tokens(prompt)) for prompt in prompts), default=0)
    need = footprint.needed(context.config, longest)
    free = available(context.device, context.config.engine.ranks)
    value = f"about {mib(need.peak)} of {mib(free)} MiB a rank ({need.parts()})"
    status = context.limits.memory.grade(need.peak / free)
    return Outcome(status, value, less_of(need, context.config.stage))


def less_of(need: Need, stage: StageConfig) -> str:
    """What makes the largest part smaller."""
    if need.states > need.peak / 2:
        less = "set engine.zero_level=3 with more engine.ranks, or engine.moments=bf16"
        return f"{less}, or take stage.algorithm=grpo" if getattr(stage, "ppo", None) else less
    if need.cache > need.activations + need.logits:
        return "lower stage.sampling.max_num_seqs or stage.sampling.max_tokens"
    if isinstance(stage, RLConfig | RewardModelConfig):
        smaller = "lower stage.max_tokens_per_micro_batch"
    else:
        smaller = "raise engine.gradient_accumulation"
    return f"{smaller}, or set engine.recompute=true"


def available(device: torch.device, ranks: int) -> float:
    """Bytes free for one rank: on its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / ranks


def disk(context: Context) -> Outcome:
    """Room for the checkpoints that the run keeps, where they will be written."""
    needed, free = footprint.disk_space(context.config)
    remedy = "free some space, set root=DIR on another disk, or lower stage.keep"
    return Outcome(FAIL if free < needed else PASS, footprint.disk(context.config), remedy)
