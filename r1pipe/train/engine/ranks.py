"""The processes of one job and their collectives.

Two kinds. Those of training (gradients, weights) run on NCCL, or gloo on a CPU, and end the job after
`engine.collective_limit_s`, as all ranks come to them together. Those of control (who stops, who has
finished, objects, sums of counts) run on gloo, where a rank may wait hours for another that samples, hashes,
exports or reads: `engine.control_limit_s`. A training step and a gather of weights begin with one of control,
so that ranks do come together; DeepSpeed has as much time where it starts, saves or loads.
"""

import atexit
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from r1pipe.config import EngineConfig
from r1pipe.config.engine import accelerator_rules
from r1pipe.config.fields import check_all
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.runs.heartbeat import waiting
from r1pipe.train.engine import patches
from r1pipe.train.engine.discovery import discover

T = TypeVar("T")
Pool = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
CPU = torch.device("cpu")
_control: dist.ProcessGroup | None = None  # of this process; None before `start`, and with one rank
_beside: dist.ProcessGroup | None = None  # as _control, for a thread that works beside training


def choose_device(accelerator: str) -> torch.device:
    """This rank's device; "auto" takes a GPU where there is one. Raises EnvironmentProblem if this host has
    fewer GPUs than ranks."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return CPU
    number, count = discover().local_rank, torch.cuda.device_count()
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:
        return torch.device("cuda", 0)  # a scheduler shows each rank its own alone
    if 0 < count <= number:
        raise EnvironmentProblem(
            f"rank {number} of this host has no GPU, as there are {count}; start as many ranks "
            "(engine.ranks, slots of the hostfile, --ntasks-per-node)"
        )
    return torch.device("cuda", number)


class Ranks:
    """Sums, maxima and objects over ranks; with one rank everything is local."""

    def __init__(self, config: EngineConfig):
        self.place = discover()
        self.rank, self.world_size = self.place.rank, self.place.world_size
        self.device = choose_device(config.accelerator)
        check_all(accelerator_rules(config, self.device.type))  # "auto" is known only here
        self._limits = timedelta(seconds=config.collective_limit_s), timedelta(seconds=config.control_limit_s)
        if self.world_size > 1:
            self.start()

    def start(self) -> None:
        """Start the process groups, once per process; without a launcher it is a group of one."""
        global _control, _beside
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.place.publish()
        if self.world_size == 1:
            # in memory: a free port may be taken before we open it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            return
        training, control = self._limits
        with waiting():  # one rank may start long before another
            dist.init_process_group(backend, timeout=control)
            _control, _beside = (dist.new_group(backend="gloo", timeout=control) for _ in range(2))
        patches.limit_collectives(training, but=(_control, _beside))
        atexit.register(patches.exit_without_teardown)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """A block of DeepSpeed's, in which its collectives may take as long as those of control."""
        training, control = self._limits
        if self.world_size > 1:
            patches.limit_collectives(control, but=(_control, _beside))
        try:
            yield
        finally:
            if self.world_size > 1:
                patches.limit_collectives(training, but=(_control, _beside))

    def sum_over_ranks(self, values: Sequence[float], training: bool = False) -> list[float]:
        """Element-wise sums; every rank gives the same number of values. `training`: all ranks come from a
        collective of training."""
        if self.world_size == 1:
            return list(values)
        device, group = (self.device, None) if training else (CPU, _control)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        with waiting():
            dist.all_reduce(total, group=group)
            return total.tolist()

    def agree_max(self, value: int) -> int:
        """The maximum over ranks."""
        if self.world_size == 1:
            return value
        greatest = torch.tensor(value, dtype=torch.int64)
        with waiting():
            dist.all_reduce(greatest, dist.ReduceOp.MAX, group=_control)
            return int(greatest)

    def peak_memory(self) -> int:
        """Bytes that the rank which needed most held at its peak: of its GPU, or of its process."""
        if self.device.type == "cuda":
            return self.agree_max(torch.cuda.max_memory_reserved(self.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return self.agree_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks (pickled between this job's own processes)."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with waiting():
            dist.all_gather_object(gathered, value, group=_control)
        return gathered

    def share_of(self, items: Iterable[T]) -> list[T]:
        """This rank's share of a list, as rank 0 has it."""
        return self.all_gather_objects([*items])[0][self.rank :: self.world_size]

    def lead(self, main: Callable[[Pool], None]) -> None:
        """Rank 0 runs `main(pool)`, and all ranks do what that gives to pool(work, items), which returns the
        results; all call. Raises CheckpointError on rank 0."""
        if self.rank != 0:
            while (given := self.all_gather_objects(None)[0]) is not None:
                self._do_share(*given)
            return
        try:
            main(lambda work, items: self._do_share(*self.all_gather_objects((work, [*items]))[0]))
        finally:
            self.all_gather_objects(None)

    def _do_share(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """This rank's share of the work; the results of all."""
        done: list[Any] = []
        problem = None
        try:
            done += map(work, items[self.rank :: self.world_size])
        except CheckpointError as error:
            problem = str(error)
        parts = self.all_gather_objects((problem, done))
        problem = next((each for each, _ in parts if each is not None), None)
        if problem is not None and self.rank == 0:
            raise CheckpointError(problem)
        return [result for _, results in parts for result in results]

    def gather_beside(self, value: Any) -> list[Any]:
        """As all_gather_objects, for one thread of each rank while its main thread trains."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=_beside)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            with waiting():
                dist.barrier(group=_control)
