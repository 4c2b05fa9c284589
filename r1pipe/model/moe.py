"""DeepSeekMoE: fine-grained routed experts beside shared ones, balanced by a bias instead of a loss.

Sources: DeepSeekMoE section 3; V3 section 2.1.2 (sigmoid gate, node-limited groups, balancing without an
auxiliary loss); V2 section 2.2 (softmax gate). No token is ever dropped.
Axis besides those of layers.py: d documents.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1pipe.config import ModelConfig
from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.fp8 import Quantisable
from r1pipe.model.layers import SwiGLU

ROWS = 32  # measured: 16 leaves too many shapes, 64 and more pad too much


@dataclass(eq=False)
class Routing:
    """One layer's inputs to its gate, and the gate's results, in one forward pass.

    A recomputation in the backward pass reuses the choice: its rounding may differ, and an expert that was
    not chosen before has no gradient.
    """

    counted_BT: Tensor | None = None  # the tokens that count in the loads (bool); None: all
    documents_BT: Tensor | None = None  # the document of each token, 0: none; None: no balance loss
    replayed_NK: Tensor | None = None  # the sampler's choice, which the gate takes over; None: its own
    experts_NK: Tensor | None = None  # chosen in the first pass
    balance: Tensor | None = None  # sum over tokens of their document's balance loss (see sequence_balance)


class Balance:
    """Which tokens of a forward pass count in the experts' loads; collects the balance loss if `with_loss`.

    Pass it to the forward pass, then call `total()`. The sequences are the documents of packed rows.
    """

    def __init__(self, segments_BT: Tensor, with_loss: bool, replayed_LNK: Tensor | None = None):
        """`segments_BT` numbers the documents of each row from 1; 0 (padding) is left out. `replayed_LNK`:
        the experts that each MoE layer is to use (routing replay, arXiv 2510.11370); None: its own choice."""
        rows_B1 = torch.arange(len(segments_BT), device=segments_BT.device).unsqueeze(1)
        self._ids_BT = segments_BT + rows_B1 * segments_BT.max()  # unique over all rows
        self._counted_BT = segments_BT != 0
        self._with_loss = with_loss
        self._replayed_LNK = replayed_LNK
        self._routings: list[Routing] = []

    @classmethod
    def of_lengths(
        cls, lengths_B: Tensor, width: int, with_loss: bool, replayed_LNK: Tensor | None = None
    ) -> "Balance":
        """For rows of `width` tokens, each one sequence of `lengths_B` tokens, padded on the right."""
        places_T = torch.arange(width, device=lengths_B.device)
        return cls((places_T < lengths_B.unsqueeze(1)).long(), with_loss, replayed_LNK)

    def routing(self, among_BT: Tensor | None = None, layer: int = -1) -> Routing:
        """The next layer's routing; only tokens in `among_BT` count. `layer` numbers the MoE layers from 0;
        below: a dense or MTP layer, for which nothing is replayed."""
        counted_BT = self._counted_BT if among_BT is None else self._counted_BT & among_BT
        documents_BT = self._ids_BT * counted_BT if self._with_loss else None
        replayed_NK = None if self._replayed_LNK is None or layer < 0 else self._replayed_LNK[layer]
        self._routings.append(Routing(counted_BT, documents_BT, replayed_NK))
        return self._routings[-1]

    def total(self) -> Tensor:
        """Sum over layers and documents of T sum_i f_i P_i; the loss is alpha times its mean over tokens."""
        layers = [routing.balance for routing in self._routings if routing.balance is not None]
        return torch.stack(layers).sum() if layers else torch.zeros(())

    @property
    def experts(self) -> list[Tensor]:
        """The experts_NK that each MoE layer has chosen, first layer first."""
        return [routing.experts_NK for routing in self._routings if routing.experts_NK is not None]


class Gate(nn.Module, kernels.Invariant):
    """Chooses K of E experts for each token and weighs them; counts tokens per expert while training."""

    weight: nn.Parameter
    e_score_correction_bias: Tensor
    tokens_per_expert: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts))
        self.register_buffer("tokens_per_expert", torch.empty(config.n_routed_experts), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Casting the model leaves the buffers in float32: a bias step of 0.001 is lost in bfloat16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def forward(self, x_ND: Tensor, routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> weights_NK (float32), experts_NK (int64), and the balance loss if `routing` has documents.

        The loss must be returned: ZeRO-3 fetches the weight for the gradient of a module's results, and the
        last layer's gate may get a gradient only from the balance loss (of prompts, in RL).
        """
        config, routing = self.config, routing or Routing()
        scores_NE = self._scores(x_ND.float(), self.weight.float())
        if routing.experts_NK is None:
            replayed_NK = routing.replayed_NK  # the scores stay live: the weights' gradients flow
            routing.experts_NK = self._choose(scores_NE.detach()) if replayed_NK is None else replayed_NK
            # activations that are recomputed inside backward have been counted
            recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            if self.training and torch.is_grad_enabled() and not recomputed:
                ones_NK = torch.ones_like(routing.experts_NK, dtype=torch.float32)
                if routing.counted_BT is not None:
                    ones_NK *= routing.counted_BT.view(-1, 1)
                self.tokens_per_expert.index_add_(0, routing.experts_NK.flatten(), ones_NK.flatten())
        experts_NK, balance = routing.experts_NK, None
        weights_NK = scores_NE.gather(1, experts_NK)
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if config.routed_scaling_factor != 1.0:
            weights_NK = weights_NK * config.routed_scaling_factor
        if routing.documents_BT is not None:
            documents_N = routing.documents_BT.flatten(0, 1)
            balance = sequence_balance(scores_NE, documents_N, config.num_experts_per_tok)
        return weights_NK, experts_NK, balance

    def _scores(self, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        """The scores of all experts, in float32."""
        invariant = self.batch_invariant and self.usable(x_ND, len(weight_ED))
        logits_NE = kernels.linear(x_ND, weight_ED) if invariant else F.linear(x_ND, weight_ED)
        if self.config.scoring_func != "sigmoid":
            return logits_NE.softmax(dim=-1)
        if invariant:  # torch's sigmoid rounds by where a number lies: in a vector or in the remainder
            return torch.stack([logits_NE, torch.zeros_like(logits_NE)], dim=-1).softmax(dim=-1)[..., 0]
        return logits_NE.sigmoid()

    def _choose(self, scores_NE: Tensor) -> Tensor:
        """The bias affects only the choice, never the weights; experts outside the best groups are closed."""
        config = self.config
        if config.topk_method == "noaux_tc":
            scores_NE = scores_NE + self.e_score_correction_bias
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            grouped_NGe = scores_NE.unflatten(-1, (config.n_group, -1))
            best = 2 if config.topk_method == "noaux_tc" else 1
            groups_NG = grouped_NGe.topk(best, dim=-1).values.sum(dim=-1)
            kept = groups_NG.topk(config.topk_group, dim=-1).indices
            closed_NG = torch.ones_like(groups_NG, dtype=torch.bool).scatter_(1, kept, False)
            scores_NE = grouped_NGe.masked_fill(closed_NG.unsqueeze(-1), float("-inf")).flatten(1)
        return scores_NE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module, Quantisable, kernels.Invariant):
    """The routed experts' SwiGLUs, fused: gate_up_proj [E, 2I, D] (gate first) and down_proj [E, D, I]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [N, D].

        Tokens are sorted by expert for one grouped matmul over the ragged groups: measured on CPU cores it
        beats running all experts on all tokens even for 8 small experts.
        """
        if self.fp8 is not None:
            return self.fp8.experts(
                x_ND, self.gate_up_proj, self.down_proj, weights_NK, experts_NK, self.kind
            )
        if self.usable(x_ND, self.down_proj.shape[2]):
            return kernels.experts(x_ND, self.gate_up_proj, self.down_proj, weights_NK, experts_NK)
        experts = self.gate_up_proj.shape[0]
        chosen, order = experts_NK.flatten().sort()
        tokens = order // experts_NK.shape[1]
        ends_E = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True)
        sorted_x, weights = x_ND.index_select(0, tokens), weights_NK.flatten().index_select(0, order)
        if x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16:
            # Groups are padded to a multiple of ROWS: this matmul compiles a kernel for every new shape,
            # which costs several times the product itself; rounded sizes repeat.
            counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
            rounded_E = (counts_E + ROWS - 1) // ROWS * ROWS
            padded_ends_E = rounded_E.cumsum(0)
            shift_E = (padded_ends_E - rounded_E) - (ends_E - counts_E)
            places, ends_E = torch.arange(len(chosen)) + shift_E.index_select(0, chosen), padded_ends_E
            padded = int(ends_E[-1])
            sorted_x = sorted_x.new_zeros(padded, sorted_x.shape[1]).index_copy(0, places, sorted_x)
            weights = weights.new_zeros(padded).index_copy(0, places, weights)
            tokens = tokens.new_zeros(padded).index_copy(0, places, tokens)  # padding adds 0 to the first
        offs = ends_E.int()
        gate, up = F.grouped_mm(sorted_x, self.gate_up_proj.transpose(1, 2), offs=offs).chunk(2, dim=-1)
        # weighted before the down projection, where rows are narrow
        inner = F.silu(gate) * up * weights.unsqueeze(-1).to(up.dtype)
        out = F.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=offs)
        return torch.zeros_like(x_ND).index_add(0, tokens, out)


class MoE(nn.Module):
    """Routed experts plus shared experts (one SwiGLU n_shared times as wide)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.experts = Experts(config)
        self.gate = Gate(config)
        self.shared_experts = SwiGLU(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """[..., D] -> [..., D]."""
        x_ND = x.flatten(0, -2)
        routing = routing or Routing()
        weights_NK, experts_NK, routing.balance = self.gate(x_ND, routing)
        return (self.experts(x_ND, weights_NK, experts_NK) + self.shared_experts(x_ND)).view_as(x)


def sequence_balance(scores_NE: Tensor, documents_N: Tensor, top_k: int) -> Tensor:
    """The sequence-wise balance loss without alpha, summed over tokens: T sum_i f_i P_i of each document.

    V3 equations 17 to 20: in a document of T tokens f_i = E / (K T) x how often expert i is among the K best
    by score (without the bias, which balances whole batches, and without groups), P_i = its mean score, where
    a token's scores are normalised to sum 1. Uniform scores give 1 per token. Documents are weighted by
    their tokens: the sum over micro-batches and ranks, divided by the whole batch's tokens, is then the mean;
    for equal lengths it is the paper's mean over sequences. `documents_N` numbers the documents of all rows
    from 1; 0 is left out.
    """
    experts = scores_NE.shape[1]
    count = len(documents_N) + 1  # at most one document per token: this bound needs no GPU sync
    best_NK = scores_NE.detach().topk(top_k, dim=-1, sorted=False).indices
    chosen_NE = torch.zeros_like(scores_NE).scatter_(1, best_NK, 1.0)
    normalised_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
    zeros_dE = scores_NE.new_zeros(count, experts)
    chosen_dE = zeros_dE.index_add(0, documents_N, chosen_NE)
    sums_dE = zeros_dE.index_add(0, documents_N, normalised_NE)
    tokens_d1 = scores_NE.new_zeros(count, 1).index_add(0, documents_N, torch.ones_like(scores_NE[:, :1]))
    # T x (E / (K T) x chosen) x (sums / T), the padding's row left out
    return (experts / top_k * (chosen_dE * sums_dE / tokens_d1.clamp(min=1))[1:]).sum()


def gates(model: nn.Module) -> list[Gate]:
    """The gates of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Gate)]


def expert_loads(model: nn.Module) -> Tensor:
    """Tokens, without padding, that each expert got in training since `reset_loads`: [L, E] float32."""
    return torch.stack([gate.tokens_per_expert for gate in gates(model)])


def reset_loads(model: nn.Module) -> None:
    for gate in gates(model):
        gate.tokens_per_expert.zero_()


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """A block whose tokens are not in the loads."""
    before = [(gate, gate.tokens_per_expert.clone()) for gate in gates(model)]
    yield
    for gate, counts_E in before:
        gate.tokens_per_expert.copy_(counts_E)


@torch.no_grad()
def update_router_bias(model: nn.Module, loads_LE: Tensor, rate: float) -> None:
    """b += rate * sign(mean load - load), once per optimizer step on the global batch (V3 section 2.1.2).

    The change's mean is subtracted: a common offset changes no choice and costs precision. V2's softmax gates
    have no bias.
    """
    for gate, loads_E in zip(gates(model), loads_LE, strict=True):  # without tokens (MTP in RL) nothing moves
        if gate.config.topk_method == "noaux_tc":
            change_E = torch.sign(loads_E.mean() - loads_E).to(gate.e_score_correction_bias) * rate
            gate.e_score_correction_bias.add_(change_E - change_E.mean())


def max_vio(loads_LE: Tensor) -> Tensor:
    """MaxVio = (largest load - mean load) / mean load of each layer [L]; 0 is balance, NaN without tokens."""
    mean_L = loads_LE.mean(dim=-1)
    return (loads_LE.max(dim=-1).values - mean_L) / mean_L
