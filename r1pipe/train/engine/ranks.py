"""The processes of one job and their collectives (gloo on the CPU, NCCL on GPUs)."""

import atexit
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1pipe.config import EngineConfig
from r1pipe.config.engine import accelerator_rules
from r1pipe.config.fields import check_all
from r1pipe.runs.heartbeat import waiting
from r1pipe.train.engine import patches


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher (0 of 1 without one)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(accelerator: str) -> torch.device:
    """This rank's device; "auto" takes a GPU where there is one."""
    if accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Ranks:
    """Sums, maxima and objects over ranks; with one rank everything is local."""

    def __init__(self, config: EngineConfig):
        self.rank, self.world_size = rank_and_world()
        self.device = choose_device(config.accelerator)
        check_all(accelerator_rules(config, self.device.type))  # "auto" is known only here
        if self.world_size > 1:
            self.start()

    def start(self) -> None:
        """Start the process group, once per process; without a launcher it is a group of one."""
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "MASTER_ADDR" in os.environ:  # every launcher sets it
            with waiting():
                dist.init_process_group(backend)
        else:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            # in memory: a free port may be taken before we open it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self.world_size > 1:
            atexit.register(patches.exit_without_teardown)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums; every rank gives the same number of values."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with waiting():
            dist.all_reduce(total)
            return total.tolist()

    def agree_max(self, value: int) -> int:
        """The maximum over ranks."""
        if self.world_size == 1:
            return value
        greatest = torch.tensor(value, dtype=torch.int64, device=self.device)
        with waiting():
            dist.all_reduce(greatest, dist.ReduceOp.MAX)
            return int(greatest)

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks (pickled between this job's own processes)."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with waiting():
            dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            with waiting():
                dist.barrier()
