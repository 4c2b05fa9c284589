"""Expert parallelism: the ranks of a group share out each layer's routed experts, and tokens travel to them.

The router, the kernels, balancing and routing replay are the model's own (r1pipe/model/moe.py): only the rows
that the experts see travel, in all-to-alls of the forward and the backward pass (GShard, arXiv 2006.16668;
V3 section 3.2). No token is dropped, and no expert has a capacity. From DeepSpeed's AutoEP come
the groups of ranks, the exchange, the reduction of gradients and the checkpoints: it takes `ParallelMoE` for
a layer of its own. AutoEP itself would replace the router, the balance loss and the padding mask as well.

Every pass needs all ranks of a group, as under ZeRO-3. For sampling and saving, `whole` collects the experts.
In a pipeline a group is of ranks with the same layers.
Axes as in r1pipe/model/layers.py, and: e local experts, M rows that a rank sends, R rows that it receives.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, compute_split_plan
from deepspeed.utils import groups
from torch import Tensor, nn

from r1pipe.config import EngineConfig, ModelConfig
from r1pipe.core.errors import ConfigError
from r1pipe.model import DeepseekV3
from r1pipe.model.moe import Experts, MoE
from r1pipe.train.engine import patches
from r1pipe.train.engine.optimizer import is_shared_out
from r1pipe.train.engine.pipeline_groups import owner_of
from r1pipe.train.engine.ranks import Ranks

PARTS = ("w1", "w3", "w2")  # DeepSpeed's names, which its checkpoints need: gate, up and down
JOINED = ("gate_up_proj", "down_proj")  # those of Experts
WHOLE = dict(zip(PARTS, (JOINED[0], *JOINED), strict=True))


class ParallelExperts(Experts):
    """This rank's experts of a layer; takes and returns the tokens of this rank, as Experts does."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def __init__(self, experts: Experts, size: int, rank: int):
        """The share of `rank` among `size` ranks."""
        nn.Module.__init__(self)
        self.total = len(experts.down_proj)
        self.local = self.total // size
        self.first = rank * self.local
        self.group: Any = None  # the ranks that share the experts; DeepSpeed makes it
        gate_up, down = (w.detach().chunk(size)[rank] for w in (experts.gate_up_proj, experts.down_proj))
        self.take(gate_up, down)
        self.fp8, self.kind = experts.fp8, experts.kind

    def take(self, gate_up_EiD: Tensor, down_EDi: Tensor) -> None:
        """Copy the weights of this rank's experts."""
        for name, part in zip(PARTS, (*gate_up_EiD.chunk(2, dim=1), down_EDi), strict=True):
            self.register_parameter(name, nn.Parameter(part.clone()))

    @property
    def gate_up_proj(self) -> Tensor:  # type: ignore[override]
        """[e, 2I, D], a copy."""
        return torch.cat([self.w1, self.w3], dim=1)

    @property
    def down_proj(self) -> Tensor:  # type: ignore[override]
        return self.w2

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [N, D]. All ranks of the group must call."""
        plan = compute_split_plan(experts_NK, self.total, self.total // self.local, self.local, self.group)
        order_M = experts_NK.flatten().argsort(stable=True)
        sent_MD = x_ND.index_select(0, order_M // experts_NK.shape[1])
        rows_RD = _AllToAllV.apply(self.group, sent_MD, plan.input_splits, plan.output_splits)
        out_RD = self._local(rows_RD, plan.local_counts_by_source)
        back_MD = _AllToAllV.apply(self.group, out_RD, plan.output_splits, plan.input_splits)
        chosen_NKD = back_MD.index_select(0, order_M.argsort()).view(*experts_NK.shape, -1)
        return torch.bmm(weights_NK.to(x_ND.dtype).unsqueeze(1), chosen_NKD).squeeze(1)

    def _local(self, rows_RD: Tensor, counts_Se: Tensor) -> Tensor:
        """The outputs of rows that are sorted by sender, then by expert; `counts_Se` of them."""
        if not len(rows_RD):  # the weights must have a gradient, which other ranks wait for
            return rows_RD + sum(weight.sum() for weight in self.parameters())
        experts_e = torch.arange(self.local, device=rows_RD.device).repeat(len(counts_Se))
        experts_R = experts_e.repeat_interleave(counts_Se.flatten())
        ones_R1 = torch.ones(len(rows_RD), 1, device=rows_RD.device)
        return super().forward(rows_RD, ones_R1, experts_R.unsqueeze(1))

    def collected(self, config: ModelConfig) -> Experts:
        """All experts of the layer; all ranks of the group must call."""
        with torch.device("meta"):
            whole = Experts(config)
        with made_whole([*self.parameters()]), torch.no_grad():
            whole.gate_up_proj = nn.Parameter(self.gate_up_proj, requires_grad=False)
            whole.down_proj = nn.Parameter(self.w2.data, requires_grad=False)
        whole.fp8, whole.kind = self.fp8, self.kind
        return whole.train(self.training)


class ParallelMoE(MoE, AutoEPMoELayer):
    """A layer whose routed experts are shared out; what DeepSpeed reads of it is set here."""

    def __init__(self, layer: MoE, size: int, rank: int):
        nn.Module.__init__(self)
        self.config = layer.config
        self.experts: Experts = ParallelExperts(layer.experts, size, rank)
        self.gate, self.shared_experts = layer.gate, layer.shared_experts
        self.ep_size, self.ep_rank, self.ep_group_name = size, rank, f"ep_size_{size}"
        self.num_experts, self.num_local_experts = self.experts.total, self.experts.local
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, size
        )
        self._mark_all()

    @torch.no_grad()
    def fill(self, whole: Callable[[str, torch.Size], Tensor]) -> None:
        """Take this rank's part of the tensors of all experts, which `whole` gives by name and shape."""
        with torch.device("meta"):
            shapes = Experts(self.config)
        named = shapes.named_parameters()
        mine = [whole(name, of.shape).chunk(self.ep_size)[self.ep_rank].clone() for name, of in named]
        assert isinstance(self.experts, ParallelExperts)
        self.experts.take(*mine)
        self._mark_all()

    def _mark_all(self) -> None:
        for parameter in self.experts.parameters():
            self._mark(parameter)

    def _mark(self, parameter: Any) -> None:
        """Tell DeepSpeed that ranks have different experts here, and which."""
        placement, shape = self.expert_placement_descriptor, [self.num_experts, *parameter.shape[1:]]
        parameter.allreduce = False
        parameter.group_name = parameter.ds_zero_partition_group_name = self.ep_group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        where = {
            constants.AUTOEP_EXPERT_PLACEMENT: placement,
            constants.AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            constants.AUTOEP_PARAM_EP_RANK: self.ep_rank,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }
        setattr(parameter, constants.DS_AUTOEP_UC_META, where)

    def set_deepspeed_parallelism(self, *arguments: Any, **named: Any) -> None:
        """DeepSpeed calls this, and makes the groups."""
        super().set_deepspeed_parallelism(*arguments, **named)
        self.experts.group = self.ep_group


def share_out(model: DeepseekV3, config: EngineConfig, ranks: Ranks) -> None:
    """Keep this rank's share of the experts in each layer that is trained: DeepSpeed saves no frozen ones.

    Layers that another rank of the pipeline has get the same names; DeepSpeed does not hear of them. A model
    on the meta device gets its weights afterwards. Raises ConfigError where ranks cannot be grouped.
    """
    size, pipeline = config.expert_parallel, config.pipeline
    if ranks.world_size % (size * pipeline):
        parts = f" times engine.pipeline={pipeline}" if pipeline > 1 else ""
        raise ConfigError(
            f"engine.expert_parallel={size}{parts} must divide the job's {ranks.world_size} ranks"
        )
    patches.make_expert_groups(ranks.device, size, pipeline)
    position, layers = ranks.rank // (ranks.world_size // pipeline), model.config.num_hidden_layers
    for prefix, parent in [*model.named_modules()]:
        layer = getattr(parent, "mlp", None)
        if not isinstance(layer, MoE) or isinstance(layer.experts, ParallelExperts):
            continue
        if layer.experts.down_proj.requires_grad:
            shared = ParallelMoE(layer, size, ranks.rank % size)
            shared.set_deepspeed_parallelism()
            if owner_of(prefix, layers, config) == position:
                parent.mlp = shared
            else:
                layer.experts = shared.experts


def shapes_of(model: DeepseekV3) -> dict[str, torch.Size]:
    """The shapes of a model's parameters by name; here they may be empty, but for the shares of experts."""
    with torch.device("meta"):
        whole = DeepseekV3(model.config)
        for name, experts in model.named_modules():
            if isinstance(experts, ParallelExperts):
                layer: Any = whole.get_submodule(name.rpartition(".")[0])
                layer.experts = ParallelExperts(layer.experts, experts.total // experts.local, 0)
    return {name: weight.shape for name, weight in whole.named_parameters()}


@contextmanager
def made_whole(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The parameters among the tensors that ranks share out, with all experts; all ranks must enter."""
    shares = [(tensor, tensor.data) for tensor in tensors if is_shared_out(tensor)]
    try:
        for tensor, share in shares:
            group: Any = groups._get_expert_parallel_group(getattr(tensor, "group_name"))  # noqa: B009
            whole = share.new_empty(dist.get_world_size(group) * len(share), *share.shape[1:])
            dist.all_gather([*whole.split(len(share))], share.contiguous(), group=group)
            tensor.data = whole
        yield
    finally:
        for tensor, share in shares:
            tensor.data = share


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All experts on every rank, for the length of a block; all ranks must enter. They have no gradient."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    shares = [(layer, layer.experts) for layer in layers if isinstance(layer.experts, ParallelExperts)]
    try:
        for layer, share in shares:
            layer.experts = share.collected(layer.config)
        yield
    finally:
        for layer, share in shares:
            layer.experts = share


def joined_names(names: Iterable[str]) -> list[str]:
    """The names of a model's parameters as it has them without expert parallelism, in the same order."""
    split = (name.rpartition(".experts.") for name in names)
    return [*dict.fromkeys(before + dot + WHOLE.get(part, part) for before, dot, part in split)]


def join_saved(ranks: Ranks, zero: Path, load: Callable[[str, str], Any]) -> None:
    """In a state in DeepSpeed's universal layout, store experts as one without expert parallelism does; all
    ranks call, and share out the layers."""
    for layer in ranks.share_of(path.name.removesuffix("w2") for path in zero.glob("*.experts.w2")):
        for file in [path.name for path in (zero / f"{layer}w2").iterdir()]:
            gate, up, down = (load(f"{zero}/{layer}{part}/{file}", "cpu") for part in PARTS)
            if isinstance(down, dict):  # not the step
                gate, up, down = (content[constants.PARAM] for content in (gate, up, down))
                gate = {constants.PARAM: torch.cat([gate, up], dim=1)}
                down = {constants.PARAM: down}
            _write(zero, layer, file, dict(zip(JOINED, (gate, down), strict=True)))
        for part in PARTS:
            shutil.rmtree(zero / f"{layer}{part}")


def split_saved(ranks: Ranks, zero: Path, model: nn.Module, load: Callable[[str, str], Any]) -> None:
    """The opposite of `join_saved`, for the experts that ranks share out."""
    layers = {f"{name}.": m for name, m in model.named_modules() if isinstance(m, ParallelExperts)}
    shapes = [getattr(experts.w1, "ds_shape", experts.w1.shape) for experts in layers.values()]
    _, inner, width = max(shapes, key=len)  # all alike, and empty where another rank of a pipeline has them
    for layer in ranks.share_of(layers):
        experts = layers[layer]
        about = {constants.EP_IS_EXPERT_PARAM: True, constants.EP_NUM_EXPERTS: experts.total}
        for file in [path.name for path in (zero / f"{layer}down_proj").iterdir()]:
            gate_up, down = (load(f"{zero}/{layer}{part}/{file}", "cpu") for part in JOINED)
            parts = [gate_up, gate_up, down]
            if isinstance(down, dict):  # not the step
                gate_up_EiD = gate_up[constants.PARAM].view(experts.total, 2 * inner, width)  # ZeRO-3: flat
                tensors = [*gate_up_EiD.chunk(2, dim=1), down[constants.PARAM].view(-1, width, inner)]
                parts = [{constants.PARAM: tensor.clone(), **about} for tensor in tensors]
            _write(zero, layer, file, dict(zip(PARTS, parts, strict=True)))
        for part in JOINED:
            shutil.rmtree(zero / f"{layer}{part}")


def _write(zero: Path, layer: str, file: str, parts: Mapping[str, Any]) -> None:
    for part, content in parts.items():
        (zero / f"{layer}{part}").mkdir(exist_ok=True)
        torch.save(content, zero / f"{layer}{part}" / file)
