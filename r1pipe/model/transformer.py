"""The DeepSeek-V3 decoder, with transformers' module names (model.layers.N.mlp.gate...)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config.model import ModelConfig, check_model
from r1pipe.core.errors import ConfigError
from r1pipe.model.decoder_layer import DecoderLayer, MTPLayer
from r1pipe.model.layers import RMSNorm, Rotary, give_memory
from r1pipe.model.logprobs import Head
from r1pipe.model.mla import (
    Keep,
    Mask,
    causal_mask,
    document_mask,
    document_positions,
    past_mask,
    position_order,
)
from r1pipe.model.moe import Balance, Routing
from r1pipe.model.mtp import same_document
from r1pipe.model.recompute import run_again_from_host, run_again_in_backward


@dataclass
class Past:
    """The tokens that rows continue, as the cache entries that `keep` was called with."""

    entries: list[Tensor]  # one per layer, [B, P, W], padded on the right
    lengths_B: Tensor  # tokens of each row's past


class Trunk(nn.Module):
    """Embedding, layers and last norm: tokens in, hidden states out. MTP layers come after the others."""

    batch_invariant = False  # as kernels.Invariant; rows that continue a past are then read by position
    # For training passes only:
    recompute = False  # keep only the inputs of layers, and run them again in backward
    offload = False  # and that of halves of layers, in the host's memory
    flex = False  # attend through FlexAttention
    compiled: Callable[..., tuple[Tensor, ...]] | None = None  # runs a layer, compiled

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        first = config.num_hidden_layers
        # without nn.Embedding's initialisation, which on the meta device imports torch's compiler (2 s)
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(first))
        self.layers.extend(MTPLayer(config, first + n) for n in range(config.num_nextn_predict_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        keep: Keep | None = None,
        past: Past | None = None,
        balance: Balance | None = None,
    ) -> Tensor:
        """-> hidden_BTD after the last norm; `keep` is called with each layer's cache entries [B, T, C+R].

        Rows hold documents (`segments_BT`), or continue `past`, or begin a text. `balance` chooses the tokens
        that count in the experts' loads (None: all but padding) and collects the layers' balance losses.
        """
        if balance is None and segments_BT is not None:
            balance = Balance(segments_BT, with_loss=False)
        rotation_BTr, mask_BTM = self._places(tokens_BT, segments_BT, past)
        x_BTD = self.embed_tokens(tokens_BT)
        for n, layer in enumerate(islice(self.layers, self.config.num_hidden_layers)):
            moe_layer = n - self.config.first_k_dense_replace
            routing = balance.routing(layer=moe_layer) if balance else Routing()
            past_BPW = past.entries[n] if past else None
            x_BTD = self._run(layer, x_BTD, rotation_BTr, mask_BTM, routing, keep, past_BPW)
        return self.norm(x_BTD)

    def after_prompts(
        self,
        prompts_PT: Tensor,
        lengths_P: Tensor,
        tokens_BT: Tensor,
        prompt_of_B: Tensor,
        balances: tuple[Balance, Balance],
    ) -> Tensor:
        """-> hidden_BTD of rows that each continue a prompt; a prompt is read once however many share it.

        `lengths_P` are the prompts' lengths without padding on the right; `balances` are those of prompts and
        of rows.
        """
        entries: list[Tensor] = []
        self(prompts_PT, keep=entries.append, balance=balances[0])
        past = Past([entry.index_select(0, prompt_of_B) for entry in entries], lengths_P[prompt_of_B])
        return self(tokens_BT, past=past, balance=balances[1])

    def mtp_hidden(
        self, hidden_BTD: Tensor, tokens_BT: Tensor, segments_BT: Tensor, balance: Balance | None = None
    ) -> list[Tensor]:
        """The multi-token prediction layers' states, one hidden_BTD for each depth, ready for the head.

        `hidden_BTD` comes from `forward`. A state is meaningless where the token that its depth reads belongs
        to another document; no other state sees it.
        """
        rotation_BTr, mask_BTM = self._places(tokens_BT, segments_BT, None)
        embedded_BTD = self.embed_tokens(tokens_BT)
        balance = balance or Balance(segments_BT, with_loss=False)
        states = []
        for depth, layer in enumerate(islice(self.layers, self.config.num_hidden_layers, None), 1):
            assert isinstance(layer, MTPLayer)
            next_BTD = torch.cat([embedded_BTD[:, depth:], torch.zeros_like(embedded_BTD[:, :depth])], dim=1)
            routing = balance.routing(same_document(segments_BT, depth))
            joined_BTD = layer.joined(hidden_BTD, next_BTD)
            x_BTD = self._run(layer, joined_BTD, rotation_BTr, mask_BTM, routing)
            hidden_BTD = layer.shared_head["norm"](x_BTD)
            states.append(hidden_BTD)
        return states

    def _places(
        self, tokens_BT: Tensor, segments_BT: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Mask]:
        """Rotations and mask of rows. Raises ConfigError where rows are too long."""
        tokens = tokens_BT.shape[1]
        longest = tokens + (past.entries[0].shape[1] if past else 0)
        if longest > self.config.max_position_embeddings:
            raise ConfigError(
                f"a row of {longest} tokens is longer than model.max_position_embeddings"
                f" ({self.config.max_position_embeddings}); shorten the rows or raise it"
            )
        table = self.rotary.table(tokens_BT.device)
        flex = self.flex and self.training and torch.is_grad_enabled()
        if segments_BT is not None:
            return table[document_positions(segments_BT)], document_mask(segments_BT, flex)
        if past is not None:
            positions_BT = past.lengths_B.unsqueeze(1) + torch.arange(tokens, device=tokens_BT.device)
            if self.batch_invariant:
                return table[positions_BT], position_order(past.lengths_B, longest - tokens, tokens)
            return table[positions_BT], past_mask(past.lengths_B, longest - tokens, tokens, flex)
        return table[:tokens].unsqueeze(0), causal_mask(tokens, table.device, flex)

    def _run(
        self,
        layer: Any,
        x_BTD: Tensor,
        rotation_BTr: Tensor,
        mask_BTM: Mask,
        routing: Routing,
        keep: Keep | None = None,
        past_BPW: Tensor | None = None,
    ) -> Tensor:
        """One layer; `recompute` runs it again in backward, with the same choice of experts."""
        inputs = (rotation_BTr, mask_BTM, keep is not None, past_BPW)
        trains = self.training and torch.is_grad_enabled()
        run = self.compiled or (run_again_in_backward if self.recompute else None)
        outputs: Sequence[Tensor]
        if trains and self.offload:
            x_BTD, *kept = run_again_from_host(layer.attend, x_BTD, *inputs)
            x_BTD, *balance = run_again_from_host(layer.transform, x_BTD, routing)
            outputs = x_BTD, *kept, *balance
        else:
            both = (x_BTD, *inputs, routing)
            outputs = run(layer, *both) if run and trains else layer(*both)
        if keep is not None:
            keep(outputs[1])
        if routing.balance is not None:
            routing.balance = outputs[-1]
        return outputs[0]


class DeepseekV3(nn.Module):
    """The language model. Initial weights are drawn from `generator` (None: seed 0), never globally.

    Built under `torch.device("meta")` it has shapes and no memory.
    """

    # The tokens that end a completion, of a loaded model's generation_config.json.
    eos_ids: tuple[int, ...] = ()

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        check_model(config)
        self.config = config
        with torch.device("meta"):  # torch's own initialisation would draw from the global stream
            self.model = Trunk(config)
            self.lm_head = Head(config.hidden_size, config.vocab_size)
        device = torch.get_default_device()
        if device.type != "meta":
            give_memory(self, device)
            self._initialise(generator or torch.Generator(device).manual_seed(0))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            for weight in module.parameters(recurse=False):
                self.draw(module, weight, generator)
            for buffer in module.buffers(recurse=False):
                buffer.zero_()

    def draw(self, module: nn.Module, weight: Tensor, generator: torch.Generator) -> None:
        """Fill in the initial values of one of a module's own weights."""
        if isinstance(module, RMSNorm):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """-> logits_BTV.

        `segments_BT` numbers the document of each token (0: padding): attention is causal and stays inside a
        document, positions restart in each, and a padding token sees only itself.
        """
        return self.lm_head(self.model(tokens_BT, segments_BT))

    def hidden(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, balance: Balance | None = None
    ) -> Tensor:
        """-> hidden_BTD, after the last norm and before lm_head."""
        return self.model(tokens_BT, segments_BT, balance=balance)

    def drop_mtp(self) -> None:
        del self.model.layers[self.config.num_hidden_layers :]
        self.config = self.model.config = replace(self.config, num_nextn_predict_layers=0)

    def freeze_mtp(self) -> None:
        """Freeze the multi-token prediction layers, for training whose loss does not reach them."""
        for layer in islice(self.model.layers, self.config.num_hidden_layers, None):
            layer.requires_grad_(False)
