"""Every place that replaces, hides or works around a part of DeepSpeed or torch, each with its reason.

All were seen in DeepSpeed 0.19.8. When you upgrade, try each one without its patch.
"""

import contextlib
import io
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

torch_load = torch.load  # torch's own, while `replaced_torch_load` redirects DeepSpeed's calls
_exit_code: int | None = None

# --- start and end of a process


def import_deepspeed() -> Any:
    """DeepSpeed without mlflow: its autotuner imports it (1.5 s), and no job uses the autotuner."""
    if "deepspeed" not in sys.modules:
        mlflow = sys.modules.get("mlflow")
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes `import mlflow` raise ImportError
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
            if mlflow:
                sys.modules["mlflow"] = mlflow
        deepspeed.utils.logger.setLevel("WARNING")
        import_muon()
    return sys.modules["deepspeed"]


def import_muon() -> None:
    """DeepSpeed's Muon without a compiler: each engine above ZeRO level 0 imports it to see whether it is in
    use, and its decorators import torch's Inductor (2.6 s). No job uses it."""
    from deepspeed.runtime import compiler

    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_


def keep_compiler_out() -> None:
    """torch's optimizers import its compiler (2.5 s of a core) to tell it to leave them alone, and no job
    compiles its optimizer."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(torch.optim.Optimizer, name).__wrapped__
        function.__dynamo_disable = function
    step: Any = torch.optim.Adam.step
    torch.optim.Adam.step = torch.no_grad()(step.__wrapped__)  # type: ignore[method-assign]


def start_deepspeed(device: torch.device) -> Any:
    """On a CPU, DeepSpeed probes with a compiler for operators that we don't use, and may spend a minute
    building one for inference."""
    os.environ["DS_ACCELERATOR"] = device.type
    deepspeed = import_deepspeed()
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}
    keep_compiler_out()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def make_expert_groups(device: torch.device, size: int, pipeline: int) -> None:
    """Groups of `size` ranks beside each other, once in a process; all ranks call. DeepSpeed makes them as if
    the ranks of a pipeline were tensor-parallel, which mixes them and may leave some out."""
    start_deepspeed(device)
    from deepspeed.utils import groups

    if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size, mp_size=1, pp_size=pipeline)


def limit_collectives(limit: timedelta, but: Sequence[dist.ProcessGroup | None]) -> None:
    """Set the limit of the collectives of all groups `but` some, and of those to come: DeepSpeed makes its
    own with torch's limits (600 s on NCCL, 1,800 s on gloo), and takes no others."""
    for group in [*distributed_c10d._world.pg_map]:
        if group not in but:
            distributed_c10d._set_pg_timeout(limit, group)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit


def exit_immediately_with(code: int) -> None:
    """After everything is written: skip the interpreter's teardown, where gloo's threads sometimes abort
    (exit code -6; torch 2.13, several ranks) and turn a finished job into a failed one."""
    global _exit_code
    _exit_code = code


def exit_without_teardown() -> None:
    """The exit handler for `exit_immediately_with`; register it first, so that it runs last."""
    if _exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code)


# --- training


def repair_level_0(
    ds: Any,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    grad_clip: float,
    parts: dist.ProcessGroup | None,
) -> None:
    """At ZeRO level 0, DeepSpeed copies every gradient to a buffer and back even for one rank, walks all
    parameters three times per step, forgets the gradient norm, and steps even if the norm is not finite; its
    ZeRO optimizers skip that step. `parts`: the ranks that have the model's other weights; None: none."""

    def clip() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if parts is not None:
            dist.all_reduce(norm.square_(), group=parts)
            norm.sqrt_()
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        optimizer.overflow = not math.isfinite(norm)  # type: ignore[attr-defined]
        if optimizer.overflow:  # type: ignore[attr-defined]
            optimizer.zero_grad()  # parameters without a gradient don't move
        ds._global_grad_norm = norm

    if ds.dp_world_size == 1:
        ds.enable_backward_allreduce = False
    ds.clip_fp32_gradients = clip
    ds.zero_grad = optimizer.zero_grad


@torch.no_grad()
def clear_padding(zero3: Any) -> None:
    """ZeRO-3 splits each parameter equally and leaves uninitialised memory where the last part is not full.
    Training ignores it, but checkpoints contain it, and differ in bits each time: fill it with zeros."""
    for parameters, master in zip(zero3.fp16_groups, zero3.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for parameter in parameters:
            size, part = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
            filled = min(max(parameter.ds_numel - part * size, 0), size)
            parameter.ds_tensor[filled:] = 0
            master.data[begin + filled : begin + size] = 0
            begin += size


@contextlib.contextmanager
def without_zero3_hooks(ds: Any) -> Iterator[None]:
    """ZeRO-3's hooks release the weights after each layer, even inside GatheredParameters, and sampling would
    gather them again for every token."""
    offload = ds.optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()


def release_prefetched(ds: Any) -> None:
    """Give back what ZeRO-3 gathered for a backward pass that did not come: GatheredParameters passes over
    weights on their way and leaves them empty."""
    offload = getattr(ds.optimizer, "parameter_offload", ds.optimizer)
    offload.get_param_coordinator()._clean_inflight_param_registry()


def partitioner(config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Partitions a parameter, as rank 0 has it. DeepSpeed does this for whole modules only, while they
    are built: then their initial weights have to be drawn first."""
    init = import_deepspeed().zero.Init(config_dict_or_path=config)
    return lambda parameter: init._convert_to_zero_parameters([parameter])


@contextlib.contextmanager
def transformers_partitions(config: dict[str, Any]) -> Iterator[None]:
    """A block in which transformers loads models sharded. It asks a global for the settings, which its own
    class sets with a package that we don't need."""
    from transformers.integrations import deepspeed as integration

    class Settings:
        def is_zero3(self) -> bool:
            return True

    settings: Any = Settings()
    settings.config = config
    integration.set_hf_deepspeed_config(settings)  # which keeps a weak reference
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


def whole(tensors: Sequence[Tensor], changed_on: int | None = None) -> AbstractContextManager[None]:
    """A block in which partitioned parameters are whole on every rank; what rank `changed_on` writes into
    them is kept."""
    return import_deepspeed().zero.GatheredParameters([*tensors], modifier_rank=changed_on)


# --- checkpoints


def replace_save(ds: Any, save: Callable[[Any, str], None]) -> None:
    """DeepSpeed's own writer raises on a full disk, while other ranks wait for this one. And it copies a
    script for extracting weights beside each state: ours are published anyway."""
    ds.checkpoint_engine.save = save
    ds._copy_recovery_script = lambda folder: None


def replace_load(ds: Any, load: Callable[..., Any]) -> None:
    """DeepSpeed loads with weights_only=False, which runs whatever code a file contains."""
    ds.checkpoint_engine.load = load


@contextlib.contextmanager
def replaced_torch_load(load: Callable[..., Any]) -> Iterator[None]:
    """Universal checkpoints bypass DeepSpeed's checkpoint engine and call torch.load(weights_only=False)."""

    def restricted(path: str, map_location: Any = None, weights_only: bool = True) -> Any:
        return load(path, map_location)

    torch.load = restricted  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = torch_load


def convert_to_universal(source: Path, target: Path, pool: Callable[..., Any]) -> None:
    """DeepSpeed's converter (levels 1 to 3) is a command that prints progress bars, unpickles anything, and
    starts a pool of processes: `pool`, a function of (work, items), stands in for it."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    output, own_pool = io.StringIO(), ds_to_universal._do_parallel_work
    ds_to_universal._do_parallel_work = lambda work, items, workers: pool(work, items)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ds_to_universal.main(arguments)
    finally:
        ds_to_universal._do_parallel_work = own_pool


def unify_universal(
    parameters: Iterable[Path], step: Tensor, wrap: tuple[str, ...], load: Callable[..., Any]
) -> None:
    """The readers of levels 1 and 2, and of level 3, expect AdamW's step in different places: also put it
    beside each parameter. The level-3 converter writes bare tensors: `wrap` those as {"param": tensor}, which
    experts that ranks share out are already. `parameters`: their folders."""
    for parameter in parameters:
        torch.save(step, parameter / "step.pt")
        for path in [parameter / f"{key}.pt" for key in wrap]:
            content = load(str(path), "cpu")
            if isinstance(content, Tensor):
                torch.save({"param": content}, path)


@contextlib.contextmanager
def reading_universal(ds: Any, buffers: dict[str, Tensor], load: Callable[..., Any]) -> Iterator[None]:
    """DeepSpeed fixes at its start whether it reads the universal layout; we know it per file. What it gets
    wrong: level 3 gives every parameter group the first one's weight decay, all parameters share one step
    counter, and buffers are not restored."""
    decays = [group["weight_decay"] for group in ds.optimizer.param_groups]
    ds._config.load_universal_checkpoint = True
    try:
        with replaced_torch_load(load):
            yield
    finally:
        ds._config.load_universal_checkpoint = False
    for group, decay in zip(ds.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in ds.optimizer.state.values():
        state["step"] = state["step"].clone()
    for name, buffer in ds.module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
