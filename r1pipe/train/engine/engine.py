"""DeepSpeed around one model: an optimizer step, save, load, gather for sampling.

Tested with DeepSpeed 0.19.8 on the CPU (gloo): one and two ranks, ZeRO 0 to 3, fp32, bf16 with fp32 masters.
Axis suffixes: L MoE layers, E routed experts.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig, OptimConfig, RouterConfig
from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import expert_loads, reset_loads, train_as, update_router_bias
from r1pipe.model.finite import first_non_finite, first_nonfinite_gradient, not_finite
from r1pipe.model.hf import lora
from r1pipe.model.kernels import meter
from r1pipe.model.moe import gates
from r1pipe.model.training import fp8_of
from r1pipe.runs import heartbeat
from r1pipe.runs.files import write_json
from r1pipe.train.engine import patches
from r1pipe.train.engine import state as engine_state
from r1pipe.train.engine.frozen import ClosureRunner
from r1pipe.train.engine.gathered import Gathered
from r1pipe.train.engine.memory import keeping_no_weights, share_of
from r1pipe.train.engine.metrics import StepStats
from r1pipe.train.engine.optimizer import adamw, deepspeed_config, lr_factor
from r1pipe.train.engine.writing import Writer

log = logging.getLogger("r1pipe")


class Engine(Gathered):
    """DeepSpeed around one model; `module` is that model, to be used inside `with engine.gathered():`."""

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
        self.zero_level, self.expert_parallel = config.zero_level, config.expert_parallel
        self.start()
        deepspeed = patches.start_deepspeed(self.device)
        self.module: Any = model
        self._share_out(config, model)
        if config.precision != "fp32":  # DeepSpeed leaves out what stands beside a sharded model
            model.bfloat16()
        train_as(model, config, self.device)
        self.pipeline: Any = self._cut(config) if config.pipeline > 1 else None
        # a dense model has none, one of transformers its own
        self.router = router if any(gates(model)) else None
        self.max_skipped, self.skipped_in_a_row = optim.max_skipped, 0
        optimizer = adamw(model, optim, config.moments)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(optim, total_steps))
        with self.patient():  # rank 0 may have a parent's hashes to check, and one may compile for longer
            self._ds, *_ = deepspeed.initialize(
                model=ClosureRunner(model),
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=deepspeed_config(config, optim.grad_clip, share_of(model, self.world_size)),
                mpu=self.pipeline.groups if self.pipeline else None,
                dist_init_required=False,
            )
        if config.zero_level == 0:
            trained = [p for p in model.parameters() if p.requires_grad]
            parts = self.pipeline.groups.states if self.pipeline else None
            patches.repair_level_0(self._ds, optimizer, trained, optim.grad_clip, parts)
        if config.zero_level == 3:
            patches.clear_padding(self._ds.optimizer)

    def _cut(self, config: EngineConfig) -> Any:
        """Raises ConfigError where the ranks cannot be grouped."""
        from r1pipe.train.engine.pipeline import Pipeline

        if self.world_size % config.pipeline:
            size = config.pipeline
            raise ConfigError(f"engine.pipeline={size} must divide the job's {self.world_size} ranks")
        return Pipeline(self.module, config, self)

    def train_step(self, micro_losses: Sequence[Callable[[], Tensor]]) -> StepStats:
        """One optimizer step; skipped on all ranks if the loss or gradient of any rank is not finite.

        A skipped step leaves weights, moments, expert biases and the schedule unchanged. Raises
        NumericProblem after more than `max_skipped` in a row.

        Each closure runs forward and returns its share of this rank's loss: shares add up, ranks average.
        Every pass under ZeRO needs all ranks: those with fewer closures repeat their last one at weight zero.
        """
        if not self.module.training:
            self.module.train()
        if self.router:
            reset_loads(self.module)
        lr = self._ds.get_lr()[0]
        if self.pipeline:
            micro_losses = [self.pipeline.closure(micro_losses)]
        repeats = self.agree_max(len(micro_losses)) - len(micro_losses)  # before backward communicates
        losses = [self._backward(closure, 1.0) for closure in micro_losses]
        loads_LE = expert_loads(self.module) if self.router else None  # a copy: repeats count no tokens
        for _ in range(repeats):
            self._backward(micro_losses[-1], 0.0)
        with heartbeat.waiting(self.world_size > 1):
            self._ds.step()
            grad_norm = float(self._ds.get_global_grad_norm())
        loads = loads_LE.flatten().tolist() if loads_LE is not None else []
        total_loss, *loads = self.sum_over_ranks([sum(losses), *loads], training=True)
        if loads_LE is not None:
            loads_LE = loads_LE.new_tensor(loads).reshape(loads_LE.shape)
        broken = not math.isfinite(grad_norm)
        counts = self._fp8_counts()
        if broken:
            self._count_skipped(micro_losses, losses, meter.not_finite(counts))
            self._fp8_counts()  # reset: locating the layer ran more passes
        else:
            self.skipped_in_a_row = 0
            if self.router and loads_LE is not None:
                update_router_bias(self.module, loads_LE, self.router.bias_rate)
        fp8 = {} if broken else meter.metrics(counts)
        mean_loss, skipped = total_loss / self.world_size, self._ds.skipped_steps
        return StepStats(mean_loss, grad_norm, lr, loads_LE, fp8, broken, skipped)

    def _backward(self, closure: Callable[[], Tensor], weight: float) -> float:
        """Forward and backward; the loss. NaN gradients make all ranks skip the step if it is not finite."""
        with keeping_no_weights() if self.zero_level == 3 else nullcontext():
            loss = self._ds(closure)
        value = loss.item()
        if not math.isfinite(value):
            weight = math.nan
        with heartbeat.waiting(self.world_size > 1):
            self._ds.backward(loss if weight == 1.0 else weight * loss)
        return value

    def _count_skipped(
        self, micro_losses: Sequence[Callable[[], Tensor]], losses: Sequence[float], quantised: str
    ) -> None:
        """Count a skipped step and log its cause; all ranks call. Raises NumericProblem above the limit."""
        self.skipped_in_a_row += 1
        cause = self._locate_nonfinite(micro_losses, losses)
        cause = f"{cause} ({quantised})" if quantised else cause
        if self.skipped_in_a_row > self.max_skipped:
            raise NumericProblem(
                f"{cause}; steps not finite in a row: {self.skipped_in_a_row}, above stage.optim.max_skipped="
                f"{self.max_skipped}: lower stage.optim.lr or check the data; none of them was saved"
            )
        if self.rank == 0:
            log.warning("a step is skipped, number %d in a row: %s", self.skipped_in_a_row, cause)

    def _locate_nonfinite(self, micro_losses: Sequence[Callable[[], Tensor]], losses: Sequence[float]) -> str:
        """What was not finite and the first layer that produced it, the same on all ranks; not the layer of a
        gradient where every pass needs all ranks."""
        number = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), None)
        layer = None
        if number is not None or self.in_step:
            layer = first_non_finite(self.module, micro_losses[-1 if number is None else number])
        found = self.all_gather_objects((None if number is None else losses[number], layer))
        broken = [(loss, layer) for loss, layer in found if loss is not None]
        if broken:
            loss, layer = broken[0]
            if self.pipeline:  # each rank has looked at its own layers
                order = [name for name, _ in self.module.named_modules()]
                layer = min((one for _, one in found if one), key=order.index, default=None)
            return not_finite(f"the loss ({loss:g})", layer)
        layers: list[str | None] = []
        if not self.in_step:
            local = (first_nonfinite_gradient(self.module, closure) for closure in micro_losses)
            layers = self.all_gather_objects(next(filter(None, local), None))
        where = next((f", first at the output of {layer}" for layer in layers if layer), "")
        return f"the gradient is not finite while the loss is: backward overflowed{where}"

    def _fp8_counts(self) -> dict[str, meter.Totals]:
        """What was quantised in this step, all ranks together; nothing without FP8."""
        fp8 = fp8_of(self.module)
        return meter.together(self.all_gather_objects(fp8.meter.take())) if fp8 else {}

    def save(self, folder: Path | str, state: dict[str, Any], writer: Writer | None = None) -> str | None:
        """Write optimizer, schedule and `state`; all ranks call. Returns a message if the disk is full.

        A `writer` that writes later has copies of them after this.
        """
        folder = Path(folder)
        writer = writer or Writer(folder)
        client = {"loop": state, "skipped_in_a_row": self.skipped_in_a_row}
        # beside adapters the model is its parent's, which the run loads again
        engine_state.write(self, self._ds, folder, client, writer, frozen=not lora.adapted(self.module))
        if self.rank == 0 and writer.problem is None:
            write_json(folder / engine_state.LAYOUT, asdict(self._layout()), indent=None)
        self.barrier()
        return writer.problem

    def load(self, folder: Path | str, scratch: Path | None = None) -> dict[str, Any]:
        """Restore what `save` wrote and return the loop's state; all ranks must call.

        A state of other ranks, of another ZeRO level or cut is converted in a temporary folder in `scratch`
        (or beside `folder`): training then resumes within rounding, not bit for bit. Raises CheckpointError
        for files that hold more than tensors and plain values.
        """
        folder = Path(folder)
        layout, mine = engine_state.read_layout(folder), self._layout()
        same = (
            replace(layout, ranks=mine.ranks) if self.zero_level == 0 else layout
        )  # level 0: for any number
        if same == mine:
            client = engine_state.read(self, self._ds, folder)
        else:
            log.info("converts the state of %s to %s", layout, mine)
            scratch = scratch or folder.parent
            client = engine_state.read_other(self, self._ds, folder, scratch, layout, mine)
        self.skipped_in_a_row = client.get("skipped_in_a_row", 0)
        # the state of an extended run has the rate of a shorter one, that of other layouts fewer groups
        schedule, groups = self._ds.lr_scheduler, self._ds.optimizer.param_groups
        schedule.base_lrs = [schedule.base_lrs[0]] * len(groups)
        for group, lr, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch)
        return client["loop"]

    def timeline(self) -> dict[str, Any]:
        """When the ranks of the first pipeline did what in their last step (r1pipe.plan.timeline); empty
        without a pipeline. All ranks call."""
        if not self.pipeline:
            return {}
        logs, peers = self.all_gather_objects(self.pipeline.timeline), self.pipeline.groups.peers
        return {"schedule": self.pipeline.schedule, "ranks": [logs[peer] for peer in peers]}

    def _layout(self) -> engine_state.Layout:
        cut = (self.pipeline.size, len(self.pipeline.places)) if self.pipeline else ()
        return engine_state.Layout(self.world_size, self.zero_level, self.expert_parallel, *cut)
