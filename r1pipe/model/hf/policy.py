"""A causal language model of transformers with the interface of DeepseekV3.

Rows may hold several documents: transformers gets position ids that restart in each and a mask [B, 1, T, M]
that keeps them apart. Axes as in layers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.core.errors import ConfigError
from r1pipe.model.logprobs import Head
from r1pipe.model.mla import document_mask, document_positions, past_mask
from r1pipe.model.moe import Balance


@dataclass(frozen=True)
class HFShape:
    """What the stages ask of a model's config, under the names of ModelConfig."""

    vocab_size: int  # rows of the embedding
    max_position_embeddings: int  # longest sequence
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int = 0  # transformers leaves multi-token prediction out


class HFTrunk(nn.Module):
    """transformers' base model: tokens in, hidden states after the last norm out."""

    recompute = False  # keep only the inputs of layers, and run them again in backward (in training alone)

    def __init__(self, network: nn.Module, shape: HFShape):
        """`network`: the base model (Qwen2Model and the like). Dropout is turned off: nothing is random."""
        super().__init__()
        self.network: Any = network
        self.shape = shape
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HFTrunk":
        """Casting the model leaves buffers in their type: rotary frequencies are wrong in bfloat16."""
        before = [(module, dict(module._buffers)) for module in self.network.modules()]
        super()._apply(fn, recurse)
        for module, buffers in before:
            for name, old in buffers.items():
                new = module._buffers[name]
                if old is not None and new is not None and new.dtype != old.dtype:
                    module._buffers[name] = old.to(new.device)
        return self

    def set_recompute(self, on: bool) -> None:
        """Raises ConfigError where transformers has no recomputation for this architecture."""
        if on and not self.network.supports_gradient_checkpointing:
            raise ConfigError(
                f"transformers cannot recompute the layers of {type(self.network).__name__}; give "
                "engine.recompute=false"
            )
        self.recompute = on
        if on:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            self.network.activation_checkpointing_enable(options)
        elif self.network.supports_gradient_checkpointing:
            self.network.activation_checkpointing_disable()

    def forward(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, balance: Balance | None = None
    ) -> Tensor:
        """-> hidden_BTD; `segments_BT` as in DeepseekV3.

        `balance` stays empty: transformers' routers are trained without a balance loss. Raises ConfigError
        where rows are too long.
        """
        self._check_length(tokens_BT.shape[1])
        if segments_BT is None:
            segments_BT = torch.ones_like(tokens_BT)
        mask_BTT = document_mask(segments_BT, flex=False)
        assert isinstance(mask_BTT, Tensor)
        return self.run(tokens_BT, document_positions(segments_BT), mask_BTT)

    def run(self, tokens_BT: Tensor, positions_BT: Tensor, seen_BTM: Tensor, cache: Any = None) -> Tensor:
        """-> hidden_BTD of tokens at given positions that attend to the keys `seen_BTM`; `cache` is one of
        transformers, which the keys and values of these tokens are added to."""
        mask_B1TM = seen_BTM.unsqueeze(1)
        if self.network.config._attn_implementation == "eager":  # adds the mask to its scores
            dtype = self.network.get_input_embeddings().weight.dtype
            lowest = torch.finfo(dtype).min
            mask_B1TM = torch.zeros_like(mask_B1TM, dtype=dtype).masked_fill_(~mask_B1TM, lowest)
        return self.network(
            input_ids=tokens_BT,
            attention_mask=mask_B1TM,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def after_prompts(
        self,
        prompts_PT: Tensor,
        lengths_P: Tensor,
        tokens_BT: Tensor,
        prompt_of_B: Tensor,
        balances: tuple[Balance, Balance],
    ) -> Tensor:
        """As Trunk's. With `recompute`, where transformers keeps no keys and values, each row reads its
        prompt itself."""
        width, tokens = prompts_PT.shape[1], tokens_BT.shape[1]
        self._check_length(width + tokens)
        lengths_B = lengths_P[prompt_of_B]
        seen_BTM = past_mask(lengths_B, width, tokens, flex=False)
        assert isinstance(seen_BTM, Tensor)
        positions_BT = lengths_B.unsqueeze(1) + torch.arange(tokens, device=tokens_BT.device)
        segments_PT = (torch.arange(width, device=lengths_P.device) < lengths_P.unsqueeze(1)).long()
        places_PT, seen_PTT = document_positions(segments_PT), document_mask(segments_PT, flex=False)
        assert isinstance(seen_PTT, Tensor)
        if self.recompute and self.training:  # also without gradients: it looks at `training` alone
            later_BTM = seen_PTT.new_zeros(len(tokens_BT), width, tokens)
            below_BTM = torch.cat([seen_PTT[prompt_of_B], later_BTM], dim=2)
            joined_BT = torch.cat([prompts_PT[prompt_of_B], tokens_BT], dim=1)
            places_BT = torch.cat([places_PT[prompt_of_B], positions_BT], dim=1)
            return self.run(joined_BT, places_BT, torch.cat([below_BTM, seen_BTM], dim=1))[:, width:]
        from transformers import DynamicCache

        cache = DynamicCache()
        self.run(prompts_PT, places_PT, seen_PTT, cache)
        cache.batch_select_indices(prompt_of_B)
        return self.run(tokens_BT, positions_BT, seen_BTM, cache)

    def _check_length(self, longest: int) -> None:
        if longest > self.shape.max_position_embeddings:
            raise ConfigError(
                f"a row of {longest} tokens is longer than model.max_position_embeddings"
                f" ({self.shape.max_position_embeddings}); shorten the rows or raise it"
            )


class HFModel(nn.Module):
    """The language model: HFTrunk and the head, which gives logits."""

    eos_ids: tuple[int, ...] = ()  # of generation_config.json
    adapter: Any = None  # PEFT's config of the adapters that lora.add has put in; None: there are none

    def __init__(self, language_model: nn.Module, longest: int):
        """`language_model`: of AutoModelForCausalLM; rows of up to `longest` tokens are read."""
        super().__init__()
        whole: Any = language_model
        self.config = HFShape(
            vocab_size=whole.get_output_embeddings().out_features,
            max_position_embeddings=longest,
            hidden_size=whole.config.hidden_size,
            num_hidden_layers=whole.config.num_hidden_layers,
        )
        self.model = HFTrunk(whole.base_model, self.config)
        # our own, so that it loops over long batches inside one call (see Head)
        self.lm_head = Head.sharing(whole.get_output_embeddings())
        whole.set_output_embeddings(self.lm_head)
        self._whole = [whole]  # in a list, so that it is no submodule: its parts are ours

    @property
    def whole(self) -> Any:
        """transformers' model, which shares every weight with this one."""
        return self._whole[0]

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """-> logits_BTV; as DeepseekV3's."""
        return self.lm_head(self.model(tokens_BT, segments_BT))

    def hidden(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, balance: Balance | None = None
    ) -> Tensor:
        """-> hidden_BTD, after the last norm and before lm_head."""
        return self.model(tokens_BT, segments_BT, balance)

    def drop_mtp(self) -> None:
        """Nothing to do: transformers leaves multi-token prediction layers out."""

    def freeze_mtp(self) -> None:
        """Nothing to do, as for drop_mtp."""
