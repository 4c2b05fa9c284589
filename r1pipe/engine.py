"""The only importer of deepspeed: ranks, one optimizer step, save, load, gather for sampling.

Tried with DeepSpeed 0.19.8 on the CPU (gloo): one and two ranks, ZeRO 0 to 3, fp32, bf16 with fp32 masters.
Axis suffixes: L MoE layers, E routed experts.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1pipe.config.schema import EngineConfig, OptimConfig, RouterConfig
from r1pipe.errors import CheckpointError, ConfigError, NumericProblem
from r1pipe.kernels import meter
from r1pipe.model import expert_loads, reset_loads, train_as, update_router_bias
from r1pipe.model.finite import first_non_finite, not_finite
from r1pipe.model.precision import fp8_of
from r1pipe.optimizer import adamw, lr_factor
from r1pipe.ranks import Ranks

NEVER = 10**12  # steps between DeepSpeed's own reports: ours are in metrics.jsonl


def _import_deepspeed() -> Any:
    """DeepSpeed without what it drags in: its autotuner imports mlflow (1.5 s), which a job never uses."""
    if "deepspeed" not in sys.modules:
        known = sys.modules.get("mlflow")
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes `import mlflow` raise ImportError
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
            if known:
                sys.modules["mlflow"] = known
        deepspeed.utils.logger.setLevel("WARNING")
    return sys.modules["deepspeed"]


def _start_deepspeed(device: torch.device) -> Any:
    """DeepSpeed's communication on top of the process group that is already there."""
    os.environ["DS_ACCELERATOR"] = device.type
    deepspeed = _import_deepspeed()
    if device.type == "cpu":
        # None of DeepSpeed's compiled operators is used on a CPU. Probing for them runs a compiler, and
        # building the one that it would find, for its inference, takes up to a minute.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


@dataclass
class StepStats:
    """What one optimizer step did."""

    loss: float  # mean over ranks
    grad_norm: float  # global norm before clipping
    lr: float  # learning rate of this step
    loads_LE: Tensor | None  # tokens per expert of this step, all ranks together
    fp8: dict[str, float]  # what quantising did in this step, all ranks together; empty without FP8


class _Runs(nn.Module):
    """Lets DeepSpeed's forward run any computation on the model, so that its hooks see every loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], Tensor]) -> Tensor:
        return closure()


def _deepspeed_config(config: EngineConfig, grad_clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # shares of the loss add up by themselves
        "managed_gradient_accumulation": False,  # step() is the boundary, after any number of backward()
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.zero_level, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision != "fp32"},
        "data_types": {"grad_accum_dtype": "fp32"},  # micro-batches add up in float32
        "steps_per_print": NEVER,
    }


class Engine(Ranks):
    """DeepSpeed around one model: a call per optimizer step, whatever the ranks, precision and ZeRO level.

    `module` is the unwrapped model, for sampling and evaluation inside `with engine.gathered():`.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        router: RouterConfig | None,
        config: EngineConfig,
        total_steps: int,
    ):
        if config.precision != "fp32" and config.zero_level == 0:
            raise ConfigError(
                f"engine.precision={config.precision} needs engine.zero_level=1 or more (float32 masters)"
            )
        super().__init__(config)
        self.start()
        deepspeed = _start_deepspeed(self.device)
        self.module: Any = model
        train_as(model, config, self.device)
        self.router, self.zero_level = router, config.zero_level
        optimizer = adamw(model, optim, config.moments)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(optim, total_steps))
        self._ds, *_ = deepspeed.initialize(
            model=_Runs(model),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=_deepspeed_config(config, optim.grad_clip),
            dist_init_required=False,
        )
        if config.zero_level == 0:
            self._trim_overhead(optimizer, optim.grad_clip, config.precision)

    def _trim_overhead(self, optimizer: torch.optim.Optimizer, grad_clip: float, precision: str) -> None:
        """Without ZeRO, DeepSpeed walks all parameters thrice a step, and drops the gradient norm."""
        if self.world_size == 1:
            self._ds.enable_backward_allreduce = False  # it would copy every gradient there and back
        if precision == "fp32":
            parameters = [p for p in self.module.parameters() if p.requires_grad]

            def clip() -> None:
                self._ds._global_grad_norm = nn.utils.clip_grad_norm_(parameters, grad_clip)

            self._ds.clip_fp32_gradients = clip
            self._ds.zero_grad = optimizer.zero_grad

    def train_step(self, micro_losses: Sequence[Callable[[], Tensor]]) -> StepStats:
        """One optimizer step.

        Raises NumericProblem, before any weight moves where the loss shows it, on what is not finite.
        Each closure runs forward and returns its share of this rank's loss: shares add up, ranks average.
        Ranks may give different numbers of closures, at least one each: those with fewer repeat their last
        one at weight zero, because under ZeRO every forward and backward pass takes all ranks.
        """
        if not self.module.training:
            self.module.train()
        if self.router:
            reset_loads(self.module)
        lr, total = self._ds.get_lr()[0], 0.0
        repeats = self.agree_max(len(micro_losses)) - len(micro_losses)  # first: a backward pass may talk too
        for closure in micro_losses:
            total += self._backward(closure, 1.0)
        loads_LE = expert_loads(self.module) if self.router else None  # a copy: repeats count no tokens
        for _ in range(repeats):
            self._backward(micro_losses[-1], 0.0)
        self._ds.step()
        loss_mean, loads_LE = self._sum_step(total, loads_LE)
        if self.router and loads_LE is not None:
            update_router_bias(self.module, loads_LE, self.router.bias_rate)
        fp8 = self._fp8_metrics()
        grad_norm = float(self._ds.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise NumericProblem(
                f"the gradient's norm is {grad_norm} while the loss is {loss_mean:g}: backward overflowed;"
                " lower stage.optim.lr or look at the data; nothing of this step was saved"
            )
        return StepStats(loss_mean, grad_norm, lr, loads_LE, fp8)

    def _backward(self, closure: Callable[[], Tensor], weight: float) -> float:
        """Forward and backward of a micro-batch; its loss, before the weight. Raises NumericProblem.

        Under ZeRO-3 the pass that looks for the broken layer takes all ranks, so all must know; otherwise a
        rank that fails ends alone, and the launcher ends the others.
        """
        loss = self._ds(closure)
        value = loss.item()
        broken = not math.isfinite(value)
        if self.agree_max(int(broken)) if self.zero_level == 3 else broken:
            told = [(value, first_non_finite(self.module, closure))]
            if self.zero_level == 3:
                told = self.all_gather_objects(told[0])
            value, layer = next(one for one in told if not math.isfinite(one[0]))
            raise not_finite(f"the loss ({value:g})", layer)
        self._ds.backward(loss if weight == 1.0 else weight * loss)
        return value

    def _fp8_metrics(self) -> dict[str, float]:
        """What was quantised in this step. Raises NumericProblem on what was not finite."""
        fp8 = fp8_of(self.module)
        return meter.metrics(meter.together(self.all_gather_objects(fp8.meter.take()))) if fp8 else {}

    def _sum_step(self, loss: float, loads_LE: Tensor | None) -> tuple[float, Tensor | None]:
        """Mean loss and summed loads over ranks, in one message."""
        if self.world_size == 1:
            return loss, loads_LE
        flat = torch.tensor([loss], dtype=torch.float64, device=self.device)
        if loads_LE is not None:
            flat = torch.cat([flat, loads_LE.reshape(-1).double()])
        dist.all_reduce(flat)
        summed_LE = flat[1:].reshape(loads_LE.shape).to(loads_LE.dtype) if loads_LE is not None else None
        return flat[0].item() / self.world_size, summed_LE

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """The whole model on every rank, for sampling, evaluation and saving; all ranks must enter.

        Under ZeRO-3 the weights are gathered once, and DeepSpeed's hooks, which would let go of them after
        each layer, are taken off meanwhile.
        """
        if self.zero_level < 3:
            yield self.module
            return
        offload = self._ds.optimizer.parameter_offload
        with _import_deepspeed().zero.GatheredParameters(list(self.module.parameters())):
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                offload.setup_zero_stage3_hooks()

    def save(self, folder: Path | str, state: dict[str, Any]) -> None:
        """Write what resume needs: optimizer, schedule and the loop's `state`; all ranks must call."""
        folder = Path(folder)
        self._ds.save_checkpoint(str(folder), tag="state", client_state={"loop": state})
        if self.rank == 0:
            layout = {"ranks": self.world_size, "zero_level": self.zero_level}
            (folder / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
        self.barrier()

    def load(self, folder: Path | str) -> dict[str, Any]:
        """Put back what `save` wrote and return the loop's state; CheckpointError if the layout differs."""
        folder = Path(folder)
        layout = json.loads((folder / "layout.json").read_text(encoding="utf-8"))
        mine = {"ranks": self.world_size, "zero_level": self.zero_level}
        if layout != mine:
            raise CheckpointError(
                f"{folder} was saved by {layout['ranks']} ranks at ZeRO {layout['zero_level']}, this job has"
                f" {mine['ranks']} at ZeRO {mine['zero_level']}; go on with the same, or start anew (--fresh)"
            )
        self._ds.checkpoint_engine.load = _load_tensors
        found, client = self._ds.load_checkpoint(str(folder), tag="state")
        if found is None:
            raise CheckpointError(f"{folder} holds no DeepSpeed state; start the stage anew (--fresh)")
        return client["loop"]


def _load_tensors(path: str, map_location: Any = None) -> Any:
    """DeepSpeed would unpickle anything; tensors, plain values and its own records are all there is."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)
