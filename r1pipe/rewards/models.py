"""Reward models: the language model's trunk with a score read at the end of the sequence (R1 supplement).

`helpful` is trained on pairs and reads the prompt and the final summary alone: reasoning is left free;
`harmless` is trained on labelled responses and reads the whole response, reasoning included.
`pair_accuracy`, `auc` and `length_correlation` tell from scores on held-out examples how good one is.
Axes: B rows, T tokens of a row, D hidden width.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1pipe.chat.template import Chat, parse
from r1pipe.config import ModelConfig
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.model import Balance, DeepseekV3, model_config_from
from r1pipe.model.hf import HFTrunk, lora
from r1pipe.model.hf.files import empty
from r1pipe.model.layers import give_memory
from r1pipe.model.names import CONFIG, published_config, published_parts, published_tensors
from r1pipe.model.policy import of_transformers
from r1pipe.model.reading import Stored, check
from r1pipe.model.scalar import ScalarModel
from r1pipe.model.shards import write_shards
from r1pipe.model.weights import fill
from r1pipe.runs import heartbeat
from r1pipe.runs.files import write_json
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL

PADDED_TOKENS = 8192  # of one scoring pass
NOT_SCORABLE = "cut off, garbage, or no summary to score"


class RewardModel(ScalarModel):
    """Scores a response, at its last token."""

    def forward(self, tokens_BT: Tensor, last_B: Tensor, balance: Balance | None = None) -> Tensor:
        """-> scores_B, read at position `last_B` of each row; tokens after it have no influence."""
        hidden_BTD = self.model(tokens_BT, balance=balance)
        rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
        return self.score(hidden_BTD[rows, last_B]).squeeze(-1).float()


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """-log P(chosen is preferred) = -log sigmoid(chosen - rejected), mean (Bradley and Terry, 1952)."""
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def point_wise_loss(scores_B: Tensor, safe_B: Tensor) -> Tensor:
    """Binary cross-entropy of P(safe) = sigmoid(score), mean."""
    return F.binary_cross_entropy_with_logits(scores_B, safe_B)


def scored_tokens(kind: str, chat: Chat, prompt: Prompt, response: str) -> list[int]:
    """The tokens that a reward model of this kind reads, the end-of-sequence token last."""
    return chat.example(prompt, parse(response).summary if kind == HELPFUL else response).tokens


def padded(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as tokens_BT, padded on the right, and the index of their last tokens, last_B."""
    width = max(map(len, rows))
    tokens_BT = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return tokens_BT, torch.tensor([len(row) - 1 for row in rows], device=device)


Passes = Sequence[Callable[[], Tensor]]


def run_all(passes: Passes) -> list[Tensor]:
    return [one_pass() for one_pass in passes]


@torch.no_grad()
def score_rows(
    model: RewardModel,
    rows: Sequence[list[int]],
    pad_id: int,
    evaluate: Callable[[Passes], list[Tensor]] = run_all,
) -> list[float]:
    """The score of each row; longest first, to pad little. `evaluate` runs the passes over the model."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches: list[list[int]] = []
    while order:
        count = max(1, PADDED_TOKENS // len(rows[order[0]]))
        batches.append(order[:count])
        order = order[count:]

    def scored(batch: list[int]) -> Tensor:
        heartbeat.tick()
        return model(*padded([rows[i] for i in batch], pad_id, model.score.weight.device))

    scores = [0.0] * len(rows)
    passes = [partial(scored, batch) for batch in batches]
    if not rows and evaluate is not run_all:  # the other ranks may have some
        evaluate([lambda: model(*padded([[pad_id]], pad_id, model.score.weight.device))])
    found = evaluate(passes) if rows else []
    for batch, scores_B in zip(batches, found, strict=True):
        for i, score in zip(batch, scores_B.tolist(), strict=True):
            scores[i] = score
    return scores


class RewardScorer:
    """A frozen reward model as a reward in 0..1: the sigmoid of its score; min(1, 2 P(safe)) if HARMLESS.

    So whatever is more likely safe than not earns the full harmlessness reward. Otherwise the most certain
    answer, a refusal, would earn more than a safe answer to a safe request.
    """

    def __init__(
        self,
        model: RewardModel,
        kind: str,
        chat: Chat,
        evaluate: Callable[[Passes], list[Tensor]] = run_all,
    ):
        """`evaluate` runs passes over the model, which may be in shares: then all ranks must call."""
        self.model, self.kind, self.chat = model.eval().requires_grad_(False), kind, chat
        self.evaluate = evaluate

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """0 for what cannot be scored: a malformed response has no summary, a truncated one no end.

        Nor can garbage that is longer than the context once encoded again: an invalid byte becomes three.
        """
        longest = self.model.config.max_position_embeddings
        rows: dict[int, list[int]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if completion.truncated or (self.kind == HELPFUL and not parse(completion.text).well_formed):
                continue
            row = scored_tokens(self.kind, self.chat, prompt, completion.text)
            if len(row) <= longest:
                rows[i] = row
        rewards = [Score(0.0, detail=NOT_SCORABLE)] * len(completions)
        scores = score_rows(self.model, list(rows.values()), self.chat.pad_id, self.evaluate)
        for i, score in zip(rows, scores, strict=True):
            value = torch.tensor(score).sigmoid().item()
            if self.kind == HARMLESS:
                value = min(1.0, 2 * value)
            rewards[i] = Score(value, detail=f"score {score:.3f}")
        return rewards


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen answer scores higher; a tie is half right."""
    return float(np.mean(0.5 + 0.5 * np.sign(np.subtract(chosen, rejected))))


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative; a tie is half."""
    values, good = np.array(scores), np.array(positive, dtype=bool)
    if good.all() or not good.any():
        return None
    return float(np.mean(0.5 + 0.5 * np.sign(np.subtract.outer(values[good], values[~good]))))


def length_correlation(scores: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Pearson's correlation of score and length: far from 0, the model may be rewarding length itself."""
    if np.std(scores) == 0 or np.std(lengths) == 0:
        return None
    return float(np.corrcoef(scores, lengths)[0, 1])


@torch.no_grad()
def standardise(model: RewardModel, scores: Sequence[float]) -> None:
    """Shift and scale the head so that these scores get mean 0 and deviation 1.

    Pairs do not fix a score's origin and barely its scale; far from 0 the sigmoid would be flat.
    """
    values = torch.tensor(scores)
    deviation = values.std(correction=0).clamp(min=1e-6)
    model.score.bias.sub_(values.mean()).div_(deviation)
    model.score.weight.div_(deviation)


def save_reward_model(model: RewardModel, folder: Path) -> None:
    """config.json and model.safetensors, the trunk under the published names, the head as score.*."""
    write_shards(((name, tensor.detach().cpu().contiguous()) for name, tensor in _tensors(model)), folder)
    if isinstance(model.config, ModelConfig):
        content = published_config(model.config, model.score.weight.dtype)
        content |= {"architectures": ["DeepseekV3ForSequenceClassification"]}
    else:
        trunk = cast(HFTrunk, model.model)
        content = trunk.network.config.to_dict()
    write_json(folder / CONFIG, content | {"num_labels": 1}, indent=2)


def load_reward_model(folder: Path) -> RewardModel:
    """The reward model of a folder, on the CPU. Raises CheckpointError naming file and tensor."""
    if not of_transformers(folder):
        model, stored = open_empty(folder)
        fill(cast(DeepseekV3, give_memory(model, "cpu")), stored)
        return model
    model = RewardModel(empty(folder))
    stored, tensors = _checked(model, folder)
    with torch.no_grad():
        for name in stored.names():
            tensors[name].copy_(stored.value(name))
    return model


def open_empty(folder: Path) -> tuple[RewardModel, Stored]:
    """A reward model whose weights are on the meta device, and its checked tensors. Raises CheckpointError
    naming file and tensor."""
    trunk = empty(folder, on_meta=True) if of_transformers(folder) else None
    with torch.device("meta"):
        model = RewardModel(trunk or DeepseekV3(model_config_from(folder)))
    return model, _checked(model, folder)[0]


def _checked(model: RewardModel, folder: Path) -> tuple[Stored, dict[str, Tensor]]:
    """A folder's tensors and, by the same names, the model's."""
    stored, tensors = Stored(folder), dict(_tensors(model))
    check(stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return stored, tensors


def _tensors(model: RewardModel) -> list[tuple[str, Tensor]]:
    if isinstance(model.model, HFTrunk):
        return [(of_transformers_name(name), tensor) for name, tensor in lora.merged(model)]
    # the published names depend on the trunk's modules alone, which both classes share
    return list(published_tensors(cast(DeepseekV3, model)))


def of_transformers_name(name: str) -> str:
    """The name in the files of a reward model of transformers."""
    return name.replace("model.network.", "model.", 1)


def stored_parts(model: RewardModel) -> Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]:
    """The parts of one of the model's tensors by their names in its files."""
    if isinstance(model.model, HFTrunk):
        return lambda name, tensor: [(of_transformers_name(name), tensor)]
    return published_parts
