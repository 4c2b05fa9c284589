"""DeepSpeed's state on disk: written and read back by the engine alone, nothing else of it unpickled.

Where another number of ranks or ZeRO level reads than wrote, what was written is first brought into the
universal layout of DeepSpeed: zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt for each parameter, whole, in a
folder that is thrown away afterwards. DeepSpeed converts from levels 1 to 3 and reads at levels 1 to 3;
level 0, which keeps everything whole, is written and read here.
"""

import contextlib
import io
import os
import re
import shutil
import struct
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from r1pipe.core.errors import CheckpointError, disk_is_full, no_room
from r1pipe.runs import heartbeat
from r1pipe.runs.files import read_object
from r1pipe.train.engine.optimizer import MOMENTS
from r1pipe.train.engine.ranks import Ranks

LAYOUT = "layout.json"  # {"ranks": int, "zero_level": int}: who wrote a state
TAG = "state"
CONVERTED = ".step-converted"  # named as what retention clears away, should a kill leave it
PARAM_GROUPS, STATES = "param_groups", "optimizer_state_dict"  # DeepSpeed's names
# What torch's restricted unpickler raises on a file that torch.save has not written so.
UNREADABLE = (
    *(UnpicklingError, EOFError, OSError, RuntimeError, AssertionError),
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error),
)
REMEDY = "remove this checkpoint, and the run goes on from the one before, or start the stage anew (--fresh)"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write(ds: Any, folder: Path, client_state: Mapping[str, Any]) -> str | None:
    """Write what resume needs; all ranks call.

    What to tell the user where this rank's disk is full: nothing is raised, as other ranks wait for this one.
    """
    problems: list[str] = []

    def save(state_dict: Any, path: str) -> None:
        if problems:
            return
        try:
            # torch's own files hide why they could not be written
            with heartbeat.working(), heartbeat.to_write(path) as file:
                torch.save(state_dict, file)
        except (OSError, RuntimeError) as error:
            if not disk_is_full(error):
                raise
            problems.append(no_room(f"{path} was not written whole", folder))

    ds.checkpoint_engine.save = save
    ds._copy_recovery_script = lambda folder: None  # the weights are published beside
    with heartbeat.waiting(ds.world_size > 1):  # but for the files, it is barriers
        ds.save_checkpoint(str(folder), tag=TAG, client_state=dict(client_state), save_latest=False)
    return problems[0] if problems else None


def read_layout(folder: Path) -> tuple[int, int]:
    """How many ranks wrote the state in a folder, and at which ZeRO level.

    Raises CheckpointError where its layout.json does not say, or says otherwise than the files beside it.
    """
    path = folder / LAYOUT
    layout = read_object(path)
    ranks, level = layout.get("ranks"), layout.get("zero_level")
    if type(ranks) is not int or type(level) is not int or ranks < 1 or level not in range(4):
        raise CheckpointError(f"{path} does not say which ranks wrote, at which ZeRO level; {REMEDY}")
    parts = len([*(folder / TAG).glob("*_optim_states.pt")])
    if parts != (ranks if level else 0) or not any((folder / TAG / name).exists() for name in MODEL_STATES):
        raise CheckpointError(
            f"{path} says ranks={ranks} zero_level={level}, but {folder / TAG} has other files; {REMEDY}"
        )
    return ranks, level


def read(ds: Any, folder: Path) -> dict[str, Any]:
    """Put back what as many ranks at the same ZeRO level wrote; the client state. Raises CheckpointError."""
    ds.checkpoint_engine.load = load_tensors
    with heartbeat.waiting(ds.world_size > 1):
        found, client = ds.load_checkpoint(str(folder), tag=TAG)
    if found is None:
        raise CheckpointError(f"{folder} holds no DeepSpeed state; start the stage anew (--fresh)")
    return client


def load_tensors(path: str, map_location: Any = None) -> Any:
    """DeepSpeed would unpickle anything; tensors, plain values and its own records are all there is.

    Raises CheckpointError on a file that holds more, or is none.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            with heartbeat.working():
                return _torch_load(path, map_location=map_location, weights_only=True)
        except UNREADABLE as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it asks for {asked[1]}" if asked else "it is damaged or missing"
            raise CheckpointError(
                f"{path} is not read: it must hold tensors and plain values alone ({why}); {REMEDY}"
            ) from None


_torch_load = torch.load


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """DeepSpeed's conversion calls torch.load itself, asking for everything to be unpickled."""

    def load(path: str, map_location: Any = None, weights_only: bool = True) -> Any:
        return load_tensors(path, map_location)

    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = _torch_load


def read_other(ranks: Ranks, ds: Any, folder: Path, scratch: Path, levels: tuple[int, int]) -> dict[str, Any]:
    """Put back what other ranks, or the first of the ZeRO `levels`, wrote, at the second; the client state.

    All ranks call; the universal layout lies in `scratch` meanwhile.
    """
    universal, (before, now) = scratch / CONVERTED, levels
    if ranks.rank == 0:
        shutil.rmtree(universal, ignore_errors=True)  # of a job that was killed meanwhile
        convert(ds, folder, universal, before)
    ranks.barrier()
    client = read_universal(ds, universal, now)
    ranks.barrier()
    if ranks.rank == 0:
        shutil.rmtree(universal)
    return client


def convert(ds: Any, folder: Path, universal: Path, zero_level: int) -> None:
    """Bring what `folder` holds, written at `zero_level`, into the universal layout; one process calls."""
    target = universal / TAG
    (target / "zero").mkdir(parents=True)
    model_state = next(folder / TAG / name for name in MODEL_STATES if (folder / TAG / name).exists())
    state = load_tensors(str(model_state), "cpu")
    if zero_level == 0:
        groups = _split(_names_in_order(ds), state["module"], state["optimizer"], target / "zero")
        step, known = _step_of(state["optimizer"]["state"]), {}
    else:
        known = _convert_by_deepspeed(folder / TAG, target)
        groups = known[PARAM_GROUPS]
        step = _step_of(known[STATES]["state"] if zero_level == 3 else _states(folder / TAG))
    # the readers of levels 1 and 2, and of 3, look for the same in different places
    for parameter in [path.parent for path in target.glob("zero/*/fp32.pt")]:
        torch.save(step, parameter / "step.pt")
        if zero_level == 3:  # as what the other levels give
            for path in [parameter / f"{key}.pt" for key in ("fp32", *MOMENTS)]:
                torch.save({"param": load_tensors(str(path), "cpu")}, path)
    both = {PARAM_GROUPS: groups, STATES: {"state": {0: {"step": step}}, PARAM_GROUPS: groups}}
    torch.save({"ds_version": state["ds_version"], **known, **both}, target / "zero" / "optimizer_state.pt")
    for name in MODEL_STATES:
        if not (target / name).exists():
            os.link(model_state, target / name)


def _convert_by_deepspeed(source: Path, target: Path) -> dict[str, Any]:
    """Levels 1 to 3; the state that is not a parameter's own. One process does it: no pool is started."""
    from deepspeed.checkpoint import ds_to_universal

    asked = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = io.StringIO()
    with _tensors_alone(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(asked)
    return load_tensors(str(target / "zero" / "optimizer_state.pt"), "cpu")


def _states(source: Path) -> dict[int, Any]:
    """AdamW's state of the first partition, from levels 1 and 2."""
    first = load_tensors(str(next(source.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))), "cpu")
    return first[STATES]["base_optimizer_state"]["state"]


def _step_of(states: Mapping[int, Mapping[str, Any]]) -> Tensor:
    """How many steps AdamW has taken: the same for every parameter."""
    return next((state["step"] for state in states.values() if "step" in state), torch.tensor(0.0))


def _names_in_order(ds: Any) -> list[str]:
    """The optimizer's parameters as level 0 numbers them: matrices first."""
    trained = [(name, p) for name, p in ds.module.named_parameters() if p.requires_grad]
    flat = [name for name, p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [name for name, _ in trained if name not in flat] + flat


def _split(
    names: list[str], weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], zero: Path
) -> list[dict[str, Any]]:
    """Write each parameter of level 0 into a folder of its own; the groups of the optimizer."""
    for number, name in enumerate(names):
        state = optimizer["state"].get(number, {})
        (zero / name).mkdir()
        torch.save({"param": weights[name].float()}, zero / name / "fp32.pt")
        for moment in MOMENTS:
            kept = state.get(moment, torch.zeros_like(weights[name]))
            torch.save({"param": kept}, zero / name / f"{moment}.pt")
    return optimizer[PARAM_GROUPS]


def read_universal(ds: Any, universal: Path, zero_level: int) -> dict[str, Any]:
    """Put back, at this engine's ranks and level, what `convert` has written; the client state."""
    decays = [group["weight_decay"] for group in ds.optimizer.param_groups]
    client = _read_whole(ds, universal) if zero_level == 0 else _read_partitioned(ds, universal)
    for group, decay in zip(ds.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # level 3 gives every group the values of the first
    for kept in ds.optimizer.state.values():
        kept["step"] = kept["step"].clone()  # and all groups one and the same counter
    state = load_tensors(str(universal / TAG / MODEL_STATES[0]), "cpu")["module"]
    for name, buffer in ds.module.named_buffers():  # DeepSpeed restores parameters alone
        if name in state:
            buffer.copy_(state[name])
    return client


def _read_partitioned(ds: Any, universal: Path) -> dict[str, Any]:
    ds._config.load_universal_checkpoint = True
    try:
        with _tensors_alone():
            return read(ds, universal)
    finally:
        ds._config.load_universal_checkpoint = False


@torch.no_grad()
def _read_whole(ds: Any, universal: Path) -> dict[str, Any]:
    """Level 0: weights and moments of every parameter; DeepSpeed reads the layout into partitions alone."""
    zero = universal / TAG / "zero"
    names = {id(p): name for name, p in ds.module.named_parameters()}
    saved = load_tensors(str(zero / "optimizer_state.pt"), "cpu")[PARAM_GROUPS]
    for group, before in zip(ds.optimizer.param_groups, saved, strict=True):
        group["lr"] = before["lr"]
        for parameter in group["params"]:
            place = zero / names[id(parameter)]
            found = {key: load_tensors(str(place / f"{key}.pt"), "cpu") for key in ("fp32", *MOMENTS, "step")}
            parameter.copy_(found["fp32"]["param"].view_as(parameter))
            ds.optimizer.state[parameter] = {
                "step": found["step"],
                **{key: found[key]["param"].view_as(parameter).to(parameter.device) for key in MOMENTS},
            }
    state = load_tensors(str(universal / TAG / MODEL_STATES[0]), "cpu")
    ds.lr_scheduler.load_state_dict(state["lr_scheduler"])
    ds.global_steps, ds.global_samples = state["global_steps"], state["global_samples"]
    ds.skipped_steps = state["skipped_steps"]
    return state
