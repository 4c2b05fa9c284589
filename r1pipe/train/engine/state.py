"""Read and write DeepSpeed's state; unpickles tensors and plain values alone.

A state of another number of ranks, ZeRO level or cut into layers is first converted to DeepSpeed's universal
layout, zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt for each whole parameter, in a temporary folder. DeepSpeed
does this for levels 1 to 3; level 0, where every rank has everything, is converted and read here. What the
ranks of a pipeline wrote is converted for one place after the other, each as if it were a whole model.
"""

import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.core.errors import CheckpointError
from r1pipe.runs import heartbeat
from r1pipe.runs.files import read_object
from r1pipe.train.engine import patches
from r1pipe.train.engine.optimizer import MOMENTS, copy_moments, is_shared_out, is_trained
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.writing import Writer

LAYOUT = "layout.json"  # the writer's Layout
TAG = "state"
PARAM_GROUPS, STATES = "param_groups", "optimizer_state_dict"  # DeepSpeed's names in its files
CONVERTED = ".step-converted"  # retention removes such names, in case a kill leaves it
# What torch's restricted unpickler raises for damaged files.
UNREADABLE = (
    *(UnpicklingError, EOFError, OSError, RuntimeError, AssertionError),
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error),
)
REMEDY = "remove this checkpoint to resume from the one before, or restart the stage (--fresh)"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class Layout:
    """How a state is spread over the ranks that wrote it."""

    ranks: int
    zero_level: int
    expert_parallel: int
    pipeline: int = 1  # ranks of a pipeline
    parts: int = 1  # of the model in it; more than ranks in a V

    def __str__(self) -> str:
        experts = f", expert parallelism over {self.expert_parallel}" if self.expert_parallel > 1 else ""
        parts = f", a pipeline of {self.pipeline} ranks and {self.parts} parts" if self.parts > 1 else ""
        return f"ranks={self.ranks} zero_level={self.zero_level}{experts}{parts}"


def write(
    ranks: Ranks, ds: Any, folder: Path, client_state: Mapping[str, Any], writer: Writer, frozen: bool = True
) -> None:
    """Write what resume needs, without `frozen` only the weights that are trained; all ranks call."""
    patches.replace_save(ds, writer.save)
    with heartbeat.waiting(ds.world_size > 1), ranks.patient():
        ds.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state=dict(client_state),
            save_latest=False,
            exclude_frozen_parameters=not frozen,
        )


def read_layout(folder: Path) -> Layout:
    """How a state was written. Raises CheckpointError if layout.json is invalid or differs from the files."""
    path = folder / LAYOUT
    absent = {"expert_parallel": 1, "pipeline": 1, "parts": 1}  # in older ones
    content = {**absent, **read_object(path)}
    values = [content.get(field.name) for field in fields(Layout)]
    ranks, level, *others = (value if type(value) is int else -1 for value in values)
    if ranks < 1 or level not in range(4) or min(others) < 1:
        raise CheckpointError(f"{path} does not name the ranks and ZeRO level of its state; {REMEDY}")
    layout, parts = Layout(ranks, level, *others), len([*(folder / TAG).glob("*_optim_states.pt")])
    if parts != (ranks if level else 0) or not any((folder / TAG / name).exists() for name in MODEL_STATES):
        raise CheckpointError(f"{path} says {layout}, but {folder / TAG} has other files; {REMEDY}")
    return layout


def read(ranks: Ranks, ds: Any, folder: Path) -> dict[str, Any]:
    """Restore a state of this job's own layout; its client state. Raises CheckpointError."""

    def load(src: Mapping[str, Tensor], dst: nn.Module) -> None:
        missing, unknown = dst.load_state_dict(src, strict=False)
        expected = {name for name, p in dst.named_parameters() if p.requires_grad and not is_shared_out(p)}
        if wrong := [*unknown, *(name for name in missing if name in expected)]:
            raise CheckpointError(f"{folder} has other weights than the model ({wrong[0]}); {REMEDY}")

    patches.replace_load(ds, load_mapped)  # else what is read would be in memory twice
    with heartbeat.at("reading a checkpoint", patient=True):
        with heartbeat.waiting(ds.world_size > 1), ranks.patient():
            loaded, client = ds.load_checkpoint(str(folder), tag=TAG, custom_load_fn=load)
        copy_moments(ds.optimizer)
    if loaded is None:
        raise CheckpointError(f"{folder} holds no DeepSpeed state; restart the stage (--fresh)")
    return client


def load_tensors(path: str, map_location: Any = None, mapped: bool = False) -> Any:
    """Tensors, plain values and DeepSpeed's own records; `mapped`: tensors are read when they are used.
    Raises CheckpointError on anything else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            with heartbeat.working():
                mapped = mapped and _can_be_mapped(path)
                return patches.torch_load(path, map_location=map_location, weights_only=True, mmap=mapped)
        except UNREADABLE as error:
            forbidden = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it contains {forbidden[1]}" if forbidden else "it is damaged or missing"
            raise CheckpointError(
                f"{path} must hold tensors and plain values alone ({why}); {REMEDY}"
            ) from None


load_mapped = partial(load_tensors, mapped=True)


def _can_be_mapped(path: str) -> bool:
    """Whether it is a zip archive, as torch writes them."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def read_other(
    ranks: Ranks, ds: Any, folder: Path, scratch: Path, old: Layout, new: Layout
) -> dict[str, Any]:
    """Restore, in the `new` layout, what was written in the `old` one; the client state."""
    universal = scratch / CONVERTED
    if ranks.rank == 0:
        shutil.rmtree(universal, ignore_errors=True)  # of a killed job
        (universal / TAG / "zero").mkdir(parents=True)
    ranks.barrier()
    convert(ranks, ds, folder, universal, old)
    _convert_experts(ranks, ds, universal / TAG / "zero", old, new)
    weights = load_tensors(str(universal / TAG / MODEL_STATES[0]), "cpu")["module"]
    with patches.reading_universal(ds, weights, load_tensors):
        client = read(ranks, ds, universal) if new.zero_level else _read_whole(ds, universal)
    ranks.barrier()
    if ranks.rank == 0:
        shutil.rmtree(universal)
    return client


def _convert_experts(ranks: Ranks, ds: Any, zero: Path, old: Layout, new: Layout) -> None:
    """Rename and cut the experts' parts where only one of the layouts has expert parallelism."""
    if (old.expert_parallel > 1) == (new.expert_parallel > 1):
        return
    from r1pipe.train.engine import expert_parallel  # it imports DeepSpeed

    if new.expert_parallel == 1:
        expert_parallel.join_saved(ranks, zero, load_tensors)
    else:
        expert_parallel.split_saved(ranks, zero, ds.module, load_tensors)
    ranks.barrier()


def convert(ranks: Ranks, ds: Any, folder: Path, universal: Path, old: Layout) -> None:
    """Convert the state in `folder`, written in the `old` layout, to the universal layout; all ranks call,
    and share out its parts and parameters."""
    target = universal / TAG
    zero = target / "zero"
    for place in reversed(range(old.pipeline)):  # what is not of one parameter is taken from the first
        source = _of_place(ranks, folder / TAG, universal, old, place)
        model_state = next(source / name for name in MODEL_STATES if (source / name).exists())
        if old.zero_level == 0:
            state = load_mapped(str(model_state), "cpu")
            _write_parameters(ranks, ds, state["module"], state["optimizer"], zero)
        else:
            with patches.replaced_torch_load(load_mapped):
                ranks.lead(partial(patches.convert_to_universal, source, target))
    step = _write_common(ds, source, target, model_state, old.zero_level) if ranks.rank == 0 else None
    step = ranks.all_gather_objects(step)[0]
    parameters = ranks.share_of(path.parent for path in zero.glob("*/fp32.pt"))
    patches.unify_universal(parameters, step, ("fp32", *MOMENTS) if old.zero_level == 3 else (), load_tensors)
    ranks.barrier()


def _of_place(ranks: Ranks, source: Path, universal: Path, old: Layout, place: int) -> Path:
    """The folder of what one place in a pipeline wrote, named as DeepSpeed names what is in no pipeline: it
    takes other places' layers for slices of all layers."""
    if old.pipeline == 1:
        return source
    from deepspeed.checkpoint import constants

    one = dict.fromkeys((constants.CHECKPOINT_PP_DEGREE, constants.CHECKPOINT_TP_DEGREE), 1)
    alone = {"mp_world_size": 1, constants.CHECKPOINT_PARALLEL_DIMS: one}
    own, mark = universal / f"place-{place}", f"mp_rank_{place:02d}_"
    if ranks.rank == 0:
        own.mkdir()
        for path in source.glob(f"*{mark}*"):
            name = path.name.replace(mark, "mp_rank_00_")
            if name in MODEL_STATES:  # DeepSpeed expects as many of them as they say
                torch.save({**load_mapped(str(path), "cpu"), **alone}, own / name)
            else:
                os.link(path, own / name)
    ranks.barrier()
    return own


def _write_common(ds: Any, source: Path, target: Path, model_state: Path, zero_level: int) -> Tensor:
    """What is not of one parameter; returns AdamW's step."""
    zero, state = target / "zero", load_mapped(str(model_state), "cpu")
    if zero_level == 0:
        converted, groups = {}, state["optimizer"][PARAM_GROUPS]
        step = _step_of(state["optimizer"]["state"])
    else:
        converted = load_tensors(str(zero / "optimizer_state.pt"), "cpu")
        groups = converted[PARAM_GROUPS]
        if zero_level == 3:
            step = _step_of(converted[STATES]["state"])
        else:
            first = next(source.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
            step = _step_of(load_mapped(str(first), "cpu")[STATES]["base_optimizer_state"]["state"])
    step = step.clone()
    # groups of the optimizer that reads: with expert parallelism, it has one more
    own = [{key: g[key] for key in ("moe", "name") if key in g} for g in ds.optimizer.param_groups]
    groups = [{**groups[min(n, len(groups) - 1)], **marks} for n, marks in enumerate(own)]
    both = {PARAM_GROUPS: groups, STATES: {"state": {0: {"step": step}}, PARAM_GROUPS: groups}}
    torch.save({"ds_version": state["ds_version"], **converted, **both}, zero / "optimizer_state.pt")
    for name in MODEL_STATES:
        if not (target / name).exists():
            os.link(model_state, target / name)
    return step


def _step_of(states: Mapping[int, Mapping[str, Any]]) -> Tensor:
    return next((state["step"] for state in states.values() if "step" in state), torch.tensor(0.0))


def _write_parameters(
    ranks: Ranks, ds: Any, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], zero: Path
) -> None:
    from r1pipe.train.engine import expert_parallel  # it imports DeepSpeed

    trained = [name for name, p in ds.module.named_parameters() if is_trained(p)]
    own = [name for name in expert_parallel.joined_names(trained) if weights[name].numel()]
    matrices = [name for name in own if weights[name].ndim > 1]
    flat = [name for name in own if weights[name].ndim < 2]
    for number, name in ranks.share_of(enumerate(matrices + flat)):  # the order of the level-0 optimizer
        state = optimizer["state"].get(number, {})
        (zero / name).mkdir()
        torch.save({"param": weights[name].float()}, zero / name / "fp32.pt")
        for moment in MOMENTS:
            value = state.get(moment, torch.zeros_like(weights[name]))
            torch.save({"param": value.clone()}, zero / name / f"{moment}.pt")


@torch.no_grad()
def _read_whole(ds: Any, universal: Path) -> dict[str, Any]:
    """Level 0: DeepSpeed reads the universal layout into partitions only."""
    zero = universal / TAG / "zero"
    names = {id(p): name for name, p in ds.module.named_parameters()}
    saved = load_tensors(str(zero / "optimizer_state.pt"), "cpu")[PARAM_GROUPS]
    for group, saved_group in zip(ds.optimizer.param_groups, saved, strict=True):
        group["lr"] = saved_group["lr"]
        for parameter in group["params"]:
            files = {key: zero / names[id(parameter)] / f"{key}.pt" for key in ("fp32", *MOMENTS, "step")}
            values = {key: load_tensors(str(path), "cpu") for key, path in files.items()}
            parameter.copy_(values["fp32"]["param"].view_as(parameter))
            ds.optimizer.state[parameter] = {
                "step": values["step"],
                **{key: values[key]["param"].view_as(parameter).to(parameter.device) for key in MOMENTS},
            }
    state = load_tensors(str(universal / TAG / MODEL_STATES[0]), "cpu")
    ds.lr_scheduler.load_state_dict(state["lr_scheduler"])
    ds.global_steps, ds.global_samples = state["global_steps"], state["global_samples"]
    ds.skipped_steps = state["skipped_steps"]
    return state
