"""The DeepSeek-V3 decoder, with transformers' module names (model.layers.N.mlp.gate...)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r1pipe.config.schema import ModelConfig
from r1pipe.errors import ConfigError
from r1pipe.model.layers import RMSNorm, Rotary, SwiGLU
from r1pipe.model.mla import MLA, Keep
from r1pipe.model.moe import Experts, Gate, MoE


@dataclass
class Past:
    """What rows go on from: tokens read before, as the cache entries that `keep` was given."""

    entries: list[Tensor]  # one per layer, [B, P, W], filled up on the right
    lengths_B: Tensor  # tokens of each row's past


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = MLA(config)
        dense = index < config.first_k_dense_replace
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotation_BTr: Tensor,
        mask_BTM: Tensor | None,
        keep: Keep | None = None,
        past_BPW: Tensor | None = None,
    ) -> Tensor:
        normed_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self.self_attn(normed_BTD, rotation_BTr, mask_BTM, keep, past_BPW)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def decode(
        self, x_SD: Tensor, rotation_Sr: Tensor, places_S: Tensor, entries_SMW: Tensor, unseen_SM: Tensor
    ) -> Tensor:
        """The same for one token per slot, on this layer's cache entries (see MLA.decode)."""
        normed_SD = self.input_layernorm(x_SD)
        x_SD = x_SD + self.self_attn.decode(normed_SD, rotation_Sr, places_S, entries_SMW, unseen_SM)
        return x_SD + self.mlp(self.post_attention_layernorm(x_SD))


class Trunk(nn.Module):
    """Embedding, layers and last norm: tokens in, hidden states out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        keep: Keep | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """-> hidden_BTD after the last norm; `keep` is called with each layer's cache entries [B, T, C+R].

        Rows are of documents (`segments_BT`), or go on from `past`, or begin a text.
        """
        tokens = tokens_BT.shape[1]
        longest = tokens + (past.entries[0].shape[1] if past else 0)
        if longest > self.config.max_position_embeddings:
            raise ConfigError(
                f"a row of {longest} tokens is longer than model.max_position_embeddings"
                f" ({self.config.max_position_embeddings}); shorten the rows or raise it"
            )
        table = self.rotary.table(tokens_BT.device)
        mask_BTM: Tensor | None = None
        if segments_BT is not None:
            rotation_BTr, mask_BTM = table[document_positions(segments_BT)], document_mask(segments_BT)
        elif past is not None:
            positions_BT = past.lengths_B.unsqueeze(1) + torch.arange(tokens, device=tokens_BT.device)
            rotation_BTr, mask_BTM = table[positions_BT], past_mask(past, tokens)
        else:
            rotation_BTr = table[:tokens].unsqueeze(0)
        x_BTD = self.embed_tokens(tokens_BT)
        for n, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rotation_BTr, mask_BTM, keep, past.entries[n] if past else None)
        return self.norm(x_BTD)


class DeepseekV3(nn.Module):
    """The language model. Initial weights are drawn from `generator` (none: seed 0), never globally.

    Built under `torch.device("meta")` it has shapes and no memory.
    """

    eos_ids: tuple[
        int, ...
    ] = ()  # what ends a completion, where the model came with a generation_config.json

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        check_shape(config)
        self.config = config
        with torch.device("meta"):  # torch's own initialisation would draw from the global stream
            self.model = Trunk(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        device = torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
            self._initialise(generator or torch.Generator(device).manual_seed(0))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear | nn.Embedding | Experts | Gate):
                for weight in module.parameters(recurse=False):
                    weight.normal_(0.0, std, generator=generator)
                for buffer in module.buffers(recurse=False):
                    buffer.zero_()

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """-> logits_BTV.

        `segments_BT` numbers the document of each token (0: padding): attention is causal and stays inside a
        document, positions restart in each, a padding token sees itself alone.
        """
        return self.lm_head(self.model(tokens_BT, segments_BT))

    def hidden(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """-> hidden_BTD, after the last norm and before lm_head."""
        return self.model(tokens_BT, segments_BT)

    def hidden_after(
        self, prompts_PT: Tensor, lengths_P: Tensor, tokens_BT: Tensor, prompt_of_B: Tensor
    ) -> Tensor:
        """-> hidden_BTD of rows that each go on from a prompt, which is read once however many share it.

        `lengths_P` are the prompts' lengths without what fills them up on the right.
        """
        read: list[Tensor] = []
        self.model(prompts_PT, keep=read.append)
        past = Past([entries.index_select(0, prompt_of_B) for entries in read], lengths_P[prompt_of_B])
        return self.model(tokens_BT, past=past)


def document_positions(segments_BT: Tensor) -> Tensor:
    """The position of each token in its own document, [B, T] int64."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(first_BT, places_T, 0).cummax(dim=1).values


def document_mask(segments_BT: Tensor) -> Tensor:
    """Which tokens each token may look at, [B, T, T] bool: causal, of its document; padding at itself."""
    tokens = segments_BT.shape[1]
    itself_TT = torch.eye(tokens, dtype=torch.bool, device=segments_BT.device)
    causal_TT = torch.ones_like(itself_TT).tril_()
    same_BTT = segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)
    return same_BTT & causal_TT & (segments_BT != 0).unsqueeze(2) | itself_TT


def past_mask(past: Past, tokens: int) -> Tensor:
    """Which tokens each of `tokens` new ones may look at, [B, T, P+T] bool: its past, then causal."""
    lengths_B11 = past.lengths_B[:, None, None]
    places_P = torch.arange(past.entries[0].shape[1], device=lengths_B11.device)
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=lengths_B11.device).tril_()
    shape = (len(past.lengths_B), tokens, -1)
    return torch.cat([(places_P < lengths_B11).expand(shape), causal_TT.expand(shape)], dim=2)


def check_shape(config: ModelConfig) -> None:
    """Refuse with one line, as ConfigError, what this model cannot be."""
    kinds = {"noaux_tc": "sigmoid", "group_limited_greedy": "softmax", "greedy": "softmax"}
    per_group = config.n_routed_experts // max(config.n_group, 1)
    problems = {
        "model.num_nextn_predict_layers must be 0: multi-token prediction is not there yet": (
            config.num_nextn_predict_layers != 0
        ),
        f"model.topk_method={config.topk_method} must be one of {', '.join(kinds)}": (
            config.topk_method not in kinds
        ),
        f"model.scoring_func={config.scoring_func} does not go with topk_method={config.topk_method}"
        f" (it takes {kinds.get(config.topk_method)})": (
            config.topk_method in kinds and config.scoring_func != kinds[config.topk_method]
        ),
        f"model.n_routed_experts={config.n_routed_experts} must be a multiple of n_group={config.n_group}": (
            config.n_group < 1 or config.n_routed_experts % config.n_group != 0
        ),
        f"model.topk_group={config.topk_group} must lie between 1 and n_group={config.n_group}": (
            not 1 <= config.topk_group <= config.n_group
        ),
        f"model.num_experts_per_tok={config.num_experts_per_tok} is more than the experts that topk_group"
        f" leaves ({config.topk_group * per_group})": config.num_experts_per_tok
        > config.topk_group * per_group,
        f"model.n_group={config.n_group} leaves groups of one expert: a group is scored by its best two": (
            config.topk_method == "noaux_tc" and config.topk_group < config.n_group and per_group < 2
        ),
        f"model.qk_rope_head_dim={config.qk_rope_head_dim} must be even": config.qk_rope_head_dim % 2 != 0,
        "model.rope_scaling.type must be yarn": (
            config.rope_scaling is not None and config.rope_scaling.type != "yarn"
        ),
    }
    for problem, there in problems.items():
        if there:
            raise ConfigError(problem)
