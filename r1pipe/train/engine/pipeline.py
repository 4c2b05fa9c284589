"""Pipeline parallelism: each rank has some of the model's layers, and micro-batches travel through the ranks.

The model's modules are on every rank, under the same names; the weights of other ranks' layers are empty
(`whole` fetches them for sampling and saving). Data is shared out as without a pipeline: for a step, the
ranks of a pipeline put their micro-batches together, and each gets the results of its own back. DeepSpeed
sees one backward pass, whose gradients are the sums of all; a rank's layers are a "model parallel" share to
it, so that gradients are averaged over the ranks with the same layers, and the norm is over all layers.

The ranks with the same layers are neighbours: what data and expert parallelism exchange is more than the
states between two parts. They may share out their experts (see expert_parallel.py): all pipelines then make
as many passes, in the same order. Axes: N tokens, D hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from r1pipe.config import EngineConfig
from r1pipe.config.parts import rank_of
from r1pipe.model import DeepseekV3
from r1pipe.model.kernels.halves import inputs_first
from r1pipe.model.moe import uncounted
from r1pipe.model.parts import Part
from r1pipe.runs import heartbeat
from r1pipe.train.engine import schedule
from r1pipe.train.engine.expert_parallel import shapes_of
from r1pipe.train.engine.passes import Pass, moved
from r1pipe.train.engine.pipeline_groups import groups_of, owner_of
from r1pipe.train.engine.ranks import Ranks

CPU = torch.device("cpu")


class Pipeline:
    """One model, cut into parts; `timeline` is when this rank did what in its last step."""

    def __init__(self, model: DeepseekV3, config: EngineConfig, ranks: Ranks):
        """Empties the weights that other ranks have, which may be empty already; all ranks call."""
        self.groups, self.module, self.device = groups_of(config.pipeline), model, ranks.device
        self.ranks, self.with_others = ranks, config.expert_parallel > 1  # experts wait for other pipelines
        self.schedule, self.size = config.schedule, config.pipeline
        self.places = rank_of(config.schedule, config.pipeline)
        self.dtype = next(model.parameters()).dtype  # of the states
        self.timeline: list[schedule.Logged] = []
        self._owners: dict[Tensor, tuple[int, torch.Size]] = {}
        shapes = shapes_of(model)
        for name, parameter in model.named_parameters():
            owner = owner_of(name, model.config.num_hidden_layers, config)
            self._owners[parameter] = owner, shapes[name]
            if owner != self.groups.position:
                parameter.data = parameter.data.new_empty(0)
                vars(parameter)["trained_elsewhere"] = parameter.requires_grad  # asked for by optimizer.py
                parameter.requires_grad_(False)
        self.parts = {
            number: Part(model, number, len(self.places))
            for number, place in enumerate(self.places)
            if place == self.groups.position
        }

    def closure(self, passes: Sequence[Pass[Any]]) -> Callable[[], Tensor]:
        """The passes of this rank, with those of the others of its pipeline, as one that returns this rank's
        share of the loss; in backward it gives the gradients. All ranks call."""
        trained = [p for p in self.module.parameters() if p.requires_grad]

        def run() -> Tensor:
            training = torch.is_grad_enabled()
            work = self._run(passes, training)
            self._share_results(passes, work)
            loss = torch.tensor(work.loss(), device=self.device)
            return _HandOver.apply(loss, work.gradients(trained), *trained) if training else loss

        return run

    @torch.no_grad()
    def evaluate(self, passes: Sequence[Pass[Any]]) -> list[Tensor]:
        """What each pass returns, on the rank that has it; all ranks call."""
        work = self._run(passes, training=False)
        begin, end = work.own
        found = self._exchanged(_on_cpu(work.values))[self.places[-1]]
        return [found[n].to(self.device) for n in range(begin, end)]

    def _run(self, passes: Sequence[Pass[Any]], training: bool) -> "_Work":
        gathered = self._exchanged([moved(one.micro, CPU) for one in passes])
        micros = [moved(micro, self.device) for of_rank in gathered for micro in of_rank]
        first, count = sum(map(len, gathered[: self.groups.position])), len(micros)
        if self.with_others:  # all pipelines make as many passes: the last one again, at weight zero
            micros += micros[-1:] * (self.ranks.agree_max(count) - count)
        work = _Work(self, passes[0], micros, count, (first, first + len(passes)), training)
        position = self.groups.position
        order = schedule.order_of(self.schedule, self.size, position, len(micros), training)
        messages = schedule.Messages(self.places, self.groups.states, self.groups.peers, work)
        log = schedule.run(order, messages)
        if training:
            self.timeline = log
        return work

    def _share_results(self, passes: Sequence[Pass[Any]], work: "_Work") -> None:
        """Give each pass what the ranks found with its micro-batch."""
        gathered = self._exchanged(_on_cpu((work.found, work.balances)))
        found = gathered[self.places[-1]][0]
        for number, one in enumerate(passes, work.own[0]):
            one.found = found[number]
            of_parts = [balances[number] for _, balances in gathered if number in balances]
            one.balance = torch.stack(of_parts).sum() if of_parts else None

    def _exchanged(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the pipeline."""
        found: list[Any] = [None] * self.size
        with heartbeat.waiting():
            dist.all_gather_object(found, value, group=self.groups.objects)
        return found

    def elements(self, tensor: Tensor) -> int:
        """Of the whole tensor."""
        return self._owners[tensor][1].numel() if tensor in self._owners else tensor.numel()

    @contextmanager
    def whole(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """A block in which parameters are on every rank; all ranks must enter."""
        mine = {tensor: tensor.data for tensor in tensors if tensor in self._owners}
        try:
            for tensor in mine:
                owner, shape = self._owners[tensor]
                if owner != self.groups.position:
                    tensor.data = tensor.data.new_empty(shape)
                dist.broadcast(tensor.data, self.groups.peers[owner], group=self.groups.states)
            yield
        finally:
            for tensor, own in mine.items():
                tensor.data = own


class _Work:
    """One step of a rank: forward and backward passes of its parts over all micro-batches."""

    def __init__(
        self,
        pipeline: Pipeline,
        like: Pass[Any],
        micros: Sequence[Any],
        count: int,
        own: tuple[int, int],
        training: bool,
    ):
        """`like`: a pass over any of the micro-batches; those from own[0] to own[1] are this rank's, those
        from `count` on repeat one."""
        self.pipeline, self.like, self.micros, self.own, self.training = pipeline, like, micros, own, training
        self.count = count
        self.values: dict[int, Tensor] = {}  # what the last part's passes return, by micro-batch
        self.found: dict[int, Any] = {}  # besides
        self.balances: dict[int, Tensor] = {}  # shares of this rank's layers
        self._live: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}  # inputs, outputs
        self._later: dict[tuple[int, int], list[dict[str, Any]]] = {}  # what W needs after I
        self._seeds: dict[tuple[int, int], Tensor | None] = {}  # the same in the first part
        self._sums: dict[nn.Parameter, Tensor] = {}

    def empty(self, micro: int) -> Tensor:
        config = self.pipeline.module.config
        rows = self.micros[micro].positions * (2 if config.num_nextn_predict_layers else 1)  # as Part's
        return torch.empty(rows, config.hidden_size, dtype=self.pipeline.dtype, device=self.pipeline.device)

    def forward(self, part: int, micro: int, received: Tensor | None) -> Tensor | None:
        with uncounted(self.pipeline.module) if micro >= self.count else nullcontext():
            return self._forward(part, micro, received)

    def _forward(self, part: int, micro: int, received: Tensor | None) -> Tensor | None:
        cut, one, data = self.pipeline.parts[part], self.like, self.micros[micro]
        if self.training and received is not None:
            received.requires_grad_()

        def read(model: DeepseekV3) -> tuple[Tensor | None, Tensor | None]:
            hidden, balances = one.read(model, data)
            value = None
            if cut.is_last:
                value, found = one.learn(model, data, hidden, balances)
                if micro < self.count:
                    self.values[micro], self.found[micro] = value.detach(), found
            return value, one.share_of(balances)

        (value, balance), states_ND = cut.run(read, received, self.pipeline.module.training)
        outputs = [output for output in (value, states_ND) if output is not None]
        if balance is not None:
            if micro < self.count:
                self.balances[micro] = balance.detach() + self.balances.get(micro, 0.0)
            if balance.requires_grad:  # not of dense layers
                outputs.append(one.balance_weight * balance)
        if self.training:
            self._live[part, micro] = [] if received is None else [received], outputs
        return None if states_ND is None else states_ND.detach()

    def backward(self, kind: str, part: int, micro: int, gradient: Tensor | None) -> Tensor | None:
        key, parameters = (part, micro), self.pipeline.parts[part].parameters()
        if kind == schedule.W and key in self._later:
            stage_backward_weight(iter(parameters), self._later.pop(key))
            self._add(parameters, [parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
            return None
        inputs, outputs = self._live[key]
        if kind == schedule.I and not inputs:  # the first part: all of it is done with its weights
            self._seeds[key] = gradient
            return None
        del self._live[key]
        gradient = self._seeds.pop(key, gradient)
        # the engine averages over the ranks with the same layers, and each of them has had all micro-batches
        # of a pipeline
        share = 1 / self.pipeline.size if micro < self.count else 0.0
        seeds = [torch.full_like(output, share) for output in outputs]
        if gradient is not None:
            seeds[0] = gradient
        if kind == schedule.I:
            with inputs_first():
                found, self._later[key] = stage_backward_input(outputs, seeds, inputs, iter(parameters))
        else:
            found = torch.autograd.grad(outputs, [*inputs, *parameters], seeds, allow_unused=True)
            self._add(parameters, found[len(inputs) :])
        if not inputs:
            return None
        return torch.zeros_like(inputs[0]) if found[0] is None else found[0].contiguous()

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Micro-batches add up in float32."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                if parameter not in self._sums:
                    self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
                self._sums[parameter] += gradient

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        return [self._sums.get(parameter) for parameter in parameters]

    def loss(self) -> float:
        """This rank's share, without dividing by ranks."""
        balance = sum(share.item() for share in self.balances.values())
        return sum(value.item() for value in self.values.values()) + self.like.balance_weight * balance


class _HandOver(torch.autograd.Function):
    """A loss whose gradients are known: what DeepSpeed runs backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # each is let go once DeepSpeed has it
        return None, None, *(None if g is None else g.mul_(d_loss[0]) for g in gradients)


def _on_cpu(value: Any) -> Any:
    """Tensors in dicts and tuples, moved to the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return tuple(map(_on_cpu, value)) if isinstance(value, tuple) else value
