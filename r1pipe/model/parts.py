"""A language model cut into parts of consecutive layers, for pipeline parallelism.

A part is a language model on the same modules: where the embedding stands it has the states of the part
before, and where the last norm stands it keeps its own for the part after. So whatever reads a model reads a
part, in each of them with the same calls. Axes: N tokens, D hidden width.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from torch import Tensor, cat, nn

from r1pipe.config.parts import layers_of
from r1pipe.model.transformer import DeepseekV3

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


class _Received(nn.Module):
    """Stands where the embedding does, and gives the states that came, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rest_ND: Tensor | None = None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        assert self.rest_ND is not None
        here_ND, self.rest_ND = self.rest_ND.tensor_split([tokens_BT.numel()])
        return here_ND.view(*tokens_BT.shape, -1)


class _Kept(nn.Module):
    """Stands where the last norm does, and keeps what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.states.append(x_BTD.flatten(0, 1))
        return x_BTD


class _Embedding(nn.Module):
    """The embedding, which also keeps what it gives: multi-token prediction reads it in the last part."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.given: list[Tensor] = []

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        self.given.append(x_BTD.flatten(0, 1))
        return x_BTD


class Part:
    """Some consecutive layers; the first part has the embedding too, the last one last norm, head and MTP."""

    def __init__(self, model: DeepseekV3, number: int, count: int):
        self.number, self.is_first, self.is_last = number, number == 0, number == count - 1
        config = model.config
        self.layers = layers_of(config.num_hidden_layers, count)[number]
        self.with_embedded = config.num_nextn_predict_layers > 0
        self.model, trunk = _shallow(model), _shallow(model.model)
        self.model.model = trunk
        trunk.config = replace(
            config,
            num_hidden_layers=len(self.layers),
            first_k_dense_replace=config.first_k_dense_replace - self.layers.start,  # numbers MoE layers
        )
        own = [*islice(model.model.layers, self.layers.start, self.layers.stop)]
        if self.is_last:
            own += islice(model.model.layers, config.num_hidden_layers, None)
        trunk.layers = nn.ModuleList(own)
        if not self.is_first:
            trunk.embed_tokens = _Received()  # type: ignore[assignment]
        elif self.with_embedded:
            trunk.embed_tokens = _Embedding(trunk.embed_tokens)  # type: ignore[assignment]
        if not self.is_last:
            trunk.norm = _Kept()  # type: ignore[assignment]

    def parameters(self) -> list[nn.Parameter]:
        """Those of its own that are trained."""
        modules: list[nn.Module] = [self.model.model]
        if self.is_last:
            modules.append(self.model.lm_head)
        found = dict.fromkeys(p for module in modules for p in module.parameters())
        return [p for p in found if p.requires_grad]

    def run(
        self, read: Callable[[DeepseekV3], R], received_ND: Tensor | None, training: bool
    ) -> tuple[R, Tensor | None]:
        """What `read` gives of the part, and the states to hand on: those of each of its calls of the trunk,
        then the embedded tokens where MTP needs them. The last part hands on nothing."""
        trunk = self.model.model
        self.model.train(training)
        embedding, norm = trunk.embed_tokens, trunk.norm
        if isinstance(embedding, _Received):
            embedding.rest_ND = received_ND
        found = read(self.model)
        if not isinstance(norm, _Kept):
            return found, None
        states, norm.states = norm.states, []
        if isinstance(embedding, _Embedding):
            states, embedding.given = states + embedding.given, []
        if isinstance(embedding, _Received) and embedding.rest_ND is not None:
            states, embedding.rest_ND = [*states, embedding.rest_ND], None
        return found, cat(states)


def part_with(name: str, layers: int, count: int) -> int:
    """The part that has a parameter of this name."""
    words = name.split(".")
    if words[:2] == ["model", "embed_tokens"]:
        return 0
    if words[:2] == ["model", "layers"]:
        return next((n for n, own in enumerate(layers_of(layers, count)) if int(words[2]) in own), count - 1)
    return count - 1


def _shallow(module: M) -> M:
    """A copy with the same modules below it, which can be replaced one by one."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
