"""The order of passes in a pipeline, and what runs them.

The orders are those of torch.distributed.pipelining: 1F1B (arXiv 2104.04473), the V of zero-bubble schedules
(arXiv 2401.10241, section 6) and DualPipeV. What runs them is our own: its PipelineStage takes one shape for
all micro-batches, and its backward pass goes through hooks with which DeepSpeed would reduce each gradient at
once. Parts are numbered along the model. In a V (zbv, dualpipev) each rank has two: the first and the last
part are on the first rank.
"""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules

from r1pipe.config.parts import rank_of
from r1pipe.runs import heartbeat

F, B, I, W = "F", "B", "I", "W"  # forward, whole backward, that of inputs, that of weights  # noqa: E741


class Step(NamedTuple):
    """One thing that a rank does: F, B, I, W, or SEND_F, RECV_F, SEND_B and RECV_B."""

    kind: str
    part: int
    micro: int


class Logged(NamedTuple):
    """When a rank did a step, in seconds from the beginning of its run."""

    kind: str
    part: int
    micro: int
    begin: float
    end: float


def order_of(schedule: str, ranks: int, rank: int, micros: int, backward: bool = True) -> list[Step]:
    """What one rank does with so many micro-batches, in order; without `backward`, forward passes alone.

    DualPipeV needs two micro-batches for each rank: with fewer the order is that of zbv, on the same parts.
    """
    if schedule == "dualpipev" and micros < 2 * ranks:
        schedule = "zbv"
    places, kinds = rank_of(schedule, ranks), {F, B, I, W} if backward else {F}
    passes = _one_forward_one_backward if schedule == "1f1b" else _in_a_v
    of_ranks = {
        number: [a for a in passes(schedule, ranks, number, micros) if a.computation_type.value in kinds]
        for number in range(ranks)
    }
    with_messages = schedules._add_send_recv(of_ranks, places.__getitem__, len(places))[rank]
    return [Step(a.computation_type.value, a.stage_index, a.microbatch_index or 0) for a in with_messages]


def _one_forward_one_backward(schedule: str, ranks: int, rank: int, micros: int) -> list[Any]:
    """torch has this order as a loop alone."""
    ahead = min(ranks - 1 - rank, micros)
    order = [(schedules.F, micro) for micro in range(ahead)]
    for micro in range(micros):
        order += [(schedules.F, micro + ahead)] if micro + ahead < micros else []
        order.append((schedules.B, micro))
    return [schedules._Action(rank, kind, micro) for kind, micro in order]


def _in_a_v(schedule: str, ranks: int, rank: int, micros: int) -> list[Any]:
    """torch's own classes take stages of theirs, of which an order needs the counts alone."""
    counts: Any = SimpleNamespace(pp_group_size=ranks, num_stages=2 * ranks, _n_microbatches=micros)
    kind: Any = schedules.ScheduleZBVZeroBubble if schedule == "zbv" else schedules.ScheduleDualPipeV
    order = [a for a in kind._calculate_single_rank_operations(counts, rank) if a is not None]
    return [inner for action in order for inner in action.sub_actions or (action,)]


class Work(Protocol):
    """What the parts of one rank compute; states and their gradients are tensors."""

    def empty(self, micro: int) -> Tensor:
        """Room for the states of a micro-batch between two parts, or their gradients."""

    def forward(self, part: int, micro: int, received: Tensor | None) -> Tensor | None:
        """The states to hand on; None from the last part."""

    def backward(self, kind: str, part: int, micro: int, gradient: Tensor | None) -> Tensor | None:
        """B, I or W: the gradient to hand back, from B and I but those of the first part. `gradient`, of what
        was handed on, comes with B and I but those of the last part."""


class Messages:
    """What goes between the ranks of a pipeline: states forward, their gradients back."""

    def __init__(
        self, places: Sequence[int], group: dist.ProcessGroup | None, peers: Sequence[int], work: Work
    ):
        """`places`: the rank of each part; `peers`: the ranks of the pipeline as the job numbers them."""
        self.places, self.group, self.peers, self.work = places, group, peers, work
        self.states: dict[tuple[int, int], Tensor] = {}  # by the part that reads them, and the micro-batch
        self.gradients: dict[tuple[int, int], Tensor] = {}  # likewise
        self._arriving: dict[int, Any] = {}  # by the id of the tensor
        self._sending: list[tuple[Any, Tensor]] = []

    def post(self, step: Step) -> None:
        """Begin to send or to receive."""
        forward = step.kind.endswith("F")
        tensors, after = (self.states, 1) if forward else (self.gradients, -1)
        if step.kind.startswith("SEND"):
            tensor = tensors.pop((step.part + after, step.micro))
            other = self.peers[self.places[step.part + after]]
            self._sending = [pair for pair in self._sending if not pair[0].is_completed()]
            self._sending.append((dist.isend(tensor, other, self.group), tensor))
            return
        tensor = tensors[step.part, step.micro] = self.work.empty(step.micro)
        other = self.peers[self.places[step.part - after]]
        self._arriving[id(tensor)] = dist.irecv(tensor, other, self.group)

    def taken(self, tensors: dict[tuple[int, int], Tensor], part: int, micro: int) -> Tensor | None:
        """What there is for a pass, once it has arrived."""
        tensor = tensors.pop((part, micro), None)
        if tensor is not None and (message := self._arriving.pop(id(tensor), None)) is not None:
            with heartbeat.waiting():
                message.wait()
        return tensor

    def finish(self) -> None:
        with heartbeat.waiting():
            for message, _ in self._sending:
                message.wait()


def run(order: Sequence[Step], messages: Messages) -> list[Logged]:
    """Do the steps of one rank of a pipeline; all of them call. Returns when each pass was done."""
    log: list[Logged] = []
    work, began = messages.work, time.monotonic()
    for step in order:
        kind, part, micro = step
        if kind not in (F, B, I, W):
            messages.post(step)
            continue
        states = messages.taken(messages.states, part, micro) if kind == F else None
        gradient = messages.taken(messages.gradients, part, micro) if kind in (B, I) else None
        begin = time.monotonic() - began
        if kind == F:
            states = work.forward(part, micro, states)
            if states is not None:
                messages.states[part + 1, micro] = states
        else:
            gradient = work.backward(kind, part, micro, gradient)
            if gradient is not None:
                messages.gradients[part - 1, micro] = gradient
        log.append(Logged(kind, part, micro, begin, time.monotonic() - began))
        heartbeat.tick()
    messages.finish()
    return log
