"""Who has what in a pipeline, and its groups of ranks, in the form in which DeepSpeed asks for them."""

from typing import Any

import torch.distributed as dist

from r1pipe.config import EngineConfig
from r1pipe.config.parts import rank_of
from r1pipe.model.parts import part_with

_groups: dict[tuple[int, int], "Groups"] = {}  # of this process, by ranks of the job and of a pipeline


class Groups:
    """The groups of ranks, with the methods that DeepSpeed asks a "model parallel unit" for."""

    def __init__(self, size: int):
        rank, world = dist.get_rank(), dist.get_world_size()
        beside = world // size
        self.position, number = divmod(rank, beside)
        self.peers = [number + beside * position for position in range(size)]
        self.replicas = [self.position * beside + other for other in range(beside)]
        for first in range(beside):  # every rank takes part in making every group
            peers = [first + beside * position for position in range(size)]
            states, objects = dist.new_group(peers), dist.new_group(peers, backend="gloo")
            if first == number:
                self.states, self.objects = states, objects
        for position in range(size):
            group = dist.new_group([position * beside + other for other in range(beside)])
            if position == self.position:
                self.data = group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return len(self.replicas)

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.replicas

    def get_model_parallel_rank(self) -> int:
        return self.position

    def get_model_parallel_world_size(self) -> int:
        return len(self.peers)

    def get_model_parallel_group(self) -> Any:
        return self.states

    def get_tensor_model_parallel_rank(self) -> int:
        return 0  # no weight is cut: all count in the gradient's norm

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_world_size(self) -> int:
        return len(self.peers)


def groups_of(size: int) -> Groups:
    """The groups of pipelines of `size` ranks, made once in a process; all ranks call."""
    key = dist.get_world_size(), size
    if key not in _groups:
        _groups[key] = Groups(size)
    return _groups[key]


def owner_of(name: str, layers: int, config: EngineConfig) -> int:
    """The rank of a pipeline that has the parameter of this name, of a model of so many layers."""
    places = rank_of(config.schedule, config.pipeline)
    return places[part_with(name, layers, len(places))]
