"""The only importer of deepspeed: ranks, one optimizer step, save, load, gather for sampling.

Tried with DeepSpeed 0.19.8 on the CPU (gloo): one and two ranks, ZeRO 0 to 3, fp32, bf16 with fp32 masters.
Axis suffixes: L MoE layers, E routed experts.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1pipe.config import EngineConfig, OptimConfig, RouterConfig
from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import expert_loads, reset_loads, train_as, update_router_bias
from r1pipe.model.kernels import meter
from r1pipe.model.training import fp8_of
from r1pipe.runs import heartbeat
from r1pipe.runs.files import write_json
from r1pipe.train.engine import state as engine_state
from r1pipe.train.engine.nonfinite import origin
from r1pipe.train.engine.optimizer import adamw, clear_padding, deepspeed_config, lr_factor
from r1pipe.train.engine.ranks import Ranks

log = logging.getLogger("r1pipe")


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
    broken: bool  # not finite, so that nothing moved; loss and grad_norm are no numbers then
    skipped: int  # such steps since the stage began


class _Runs(nn.Module):
    """Lets DeepSpeed's forward run any computation on the model, so that its hooks see every loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], Tensor]) -> Tensor:
        return closure()


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
        self.max_skipped, self.skipped_in_a_row = optim.max_skipped, 0
        optimizer = adamw(model, optim, config.moments)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(optim, total_steps))
        self._ds, *_ = deepspeed.initialize(
            model=_Runs(model),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(config, optim.grad_clip),
            dist_init_required=False,
        )
        if config.zero_level == 0:
            self._trim_overhead(optimizer, optim.grad_clip, config.precision)
        elif config.zero_level == 3:
            clear_padding(self._ds.optimizer, self.rank)

    def _trim_overhead(self, optimizer: torch.optim.Optimizer, grad_clip: float, precision: str) -> None:
        """Without ZeRO, DeepSpeed walks all parameters thrice a step, and drops the gradient norm."""
        if self.world_size == 1:
            self._ds.enable_backward_allreduce = False  # it would copy every gradient there and back
        if precision == "fp32":
            parameters = [p for p in self.module.parameters() if p.requires_grad]

            def clip() -> None:
                norm = nn.utils.clip_grad_norm_(parameters, grad_clip)
                # ZeRO's own optimizers do the same where the norm is not finite
                optimizer.overflow = not math.isfinite(norm)  # type: ignore[attr-defined]
                if optimizer.overflow:  # type: ignore[attr-defined]
                    optimizer.zero_grad()  # what has no gradient is not moved
                self._ds._global_grad_norm = norm

            self._ds.clip_fp32_gradients = clip
            self._ds.zero_grad = optimizer.zero_grad

    def train_step(self, micro_losses: Sequence[Callable[[], Tensor]]) -> StepStats:
        """One optimizer step, or none where the loss or the gradient of any rank is not finite.

        Then it is skipped on all ranks and counted: weights, moments, the experts' biases and the learning
        rate's schedule stay where they are, as with torch's GradScaler. Raises NumericProblem where more than
        `max_skipped` in a row had to be.

        Each closure runs forward and returns its share of this rank's loss: shares add up, ranks average.
        Ranks may give different numbers of closures, at least one each: those with fewer repeat their last
        one at weight zero, because under ZeRO every forward and backward pass takes all ranks.
        """
        if not self.module.training:
            self.module.train()
        if self.router:
            reset_loads(self.module)
        lr = self._ds.get_lr()[0]
        repeats = self.agree_max(len(micro_losses)) - len(micro_losses)  # first: a backward pass may talk too
        losses = [self._backward(closure, 1.0) for closure in micro_losses]
        loads_LE = expert_loads(self.module) if self.router else None  # a copy: repeats count no tokens
        for _ in range(repeats):
            self._backward(micro_losses[-1], 0.0)
        with heartbeat.waiting(self.world_size > 1):
            self._ds.step()
            grad_norm = float(self._ds.get_global_grad_norm())
            loss_aggregation, loads_LE = self._sum_step(sum(losses), loads_LE)
        broken = not math.isfinite(grad_norm)
        counts = self._fp8_counts()
        if broken:
            self._skipped(micro_losses, losses, meter.not_finite(counts))
            self._fp8_counts()  # of the passes that looked for the layer
        else:
            self.skipped_in_a_row = 0
            if self.router and loads_LE is not None:
                update_router_bias(self.module, loads_LE, self.router.bias_rate)
        fp8 = {} if broken else meter.metrics(counts)
        return StepStats(loss_aggregation, grad_norm, lr, loads_LE, fp8, broken, self._ds.skipped_steps)

    def _backward(self, closure: Callable[[], Tensor], weight: float) -> float:
        """Forward and backward of a micro-batch; its loss, before the weight.

        A loss that is not finite is made to give gradients that are not, whatever led to it: summed over
        ranks they reach all of them, so that all skip the step without a word more.
        """
        loss = self._ds(closure)
        value = loss.item()
        if not math.isfinite(value):
            weight = math.nan
        with heartbeat.waiting(self.world_size > 1):
            self._ds.backward(loss if weight == 1.0 else weight * loss)
        return value

    def _skipped(
        self, micro_losses: Sequence[Callable[[], Tensor]], losses: Sequence[float], quantised: str
    ) -> None:
        """Count a skipped step and say where it broke; all ranks call. Raises NumericProblem past a limit."""
        self.skipped_in_a_row += 1
        what = origin(self, self.module, micro_losses, losses, partitioned=self.zero_level == 3)
        what = f"{what} ({quantised})" if quantised else what
        if self.skipped_in_a_row > self.max_skipped:
            raise NumericProblem(
                f"{what}; steps not finite in a row: {self.skipped_in_a_row}, above stage.optim.max_skipped="
                f"{self.max_skipped}: lower stage.optim.lr or look at the data; nothing of them was saved"
            )
        if self.rank == 0:
            log.warning("a step is skipped, number %d in a row: %s", self.skipped_in_a_row, what)

    def _fp8_counts(self) -> dict[str, meter.Numbers]:
        """What was quantised in this step, all ranks together; nothing without FP8."""
        fp8 = fp8_of(self.module)
        return meter.together(self.all_gather_objects(fp8.meter.take())) if fp8 else {}

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
        with ExitStack() as stack:
            with heartbeat.waiting(self.world_size > 1):
                whole = _import_deepspeed().zero.GatheredParameters(list(self.module.parameters()))
                stack.enter_context(whole)
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                offload.setup_zero_stage3_hooks()

    def save(self, folder: Path | str, state: dict[str, Any]) -> str | None:
        """Write what resume needs: optimizer, schedule and the loop's `state`; all ranks must call.

        What to tell the user where this rank's disk is full, None where all went well.
        """
        folder = Path(folder)
        client = {"loop": state, "skipped_in_a_row": self.skipped_in_a_row}
        problem = engine_state.write(self._ds, folder, client)
        if self.rank == 0 and problem is None:
            write_json(folder / engine_state.LAYOUT, self._layout(), indent=None)
        self.barrier()
        return problem

    def load(self, folder: Path | str, scratch: Path | None = None) -> dict[str, Any]:
        """Put back what `save` wrote and return the loop's state; all ranks must call.

        What other ranks, or another ZeRO level, wrote goes through DeepSpeed's universal layout, in a folder
        in `scratch` (or beside) that is gone afterwards: training goes on within rounding, not to the bit.
        Raises CheckpointError on files that hold more than tensors and plain values.
        """
        folder = Path(folder)
        ranks, level = engine_state.read_layout(folder)
        if (ranks, level) == (self.world_size, self.zero_level) or level == self.zero_level == 0:
            client = engine_state.read(self._ds, folder)  # level 0 is the same on all
        else:
            log.info("brings the state of %d ranks at ZeRO level %d to %s", ranks, level, self._layout())
            levels = level, self.zero_level
            client = engine_state.read_other(self, self._ds, folder, scratch or folder.parent, levels)
        self.skipped_in_a_row = client.get("skipped_in_a_row", 0)
        self._follow_schedule()
        return client["loop"]

    def _follow_schedule(self) -> None:
        """Set the next step's learning rate by this run's schedule: a state that was saved when the run had
        fewer steps holds that of a shorter one."""
        schedule = self._ds.lr_scheduler
        for group, lr, factor in zip(
            self._ds.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(schedule.last_epoch)

    def _layout(self) -> dict[str, int]:
        return {"ranks": self.world_size, "zero_level": self.zero_level}
