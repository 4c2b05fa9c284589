"""What each rank of a pipeline has, as a model by itself: the formulas of a whole model then hold for it."""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from r1pipe.config import HFConfig, ModelConfig
from r1pipe.config.parts import layers_of, rank_of

M = TypeVar("M", bound=ModelConfig | HFConfig, covariant=True)


@dataclass(frozen=True)
class Cut(Generic[M]):
    """One rank's share of a model."""

    model: M  # its layers; with a vocabulary of 0 it has neither embedding nor head
    passes: float = 1.0  # micro-batches whose activations it keeps at once, at most
    between: int = 0  # elements of a token that it keeps of such a pass, from and for other parts
    at_once: float = 0.0  # share of its weights whose gradients of one pass are whole beside their sums


def cuts(
    model: ModelConfig, schedule: str, ranks: int, micro_batches: float = float("inf")
) -> list[Cut[ModelConfig]]:
    """As the engine cuts a model. A rank of 1F1B keeps one pass for each rank after it and its own; for zbv
    and dualpipev see r1pipe.plan.memory.in_flight."""
    if ranks == 1:
        return [Cut(model)]
    places = rank_of(schedule, ranks)
    parts, found = layers_of(model.num_hidden_layers, len(places)), []
    for rank in range(ranks):
        own = [part for part, place in enumerate(places) if place == rank]
        layers = [layer for part in own for layer in parts[part]]
        is_first, is_last = 0 in own, len(places) - 1 in own
        share = replace(
            model,
            num_hidden_layers=len(layers),
            first_k_dense_replace=sum(layer < model.first_k_dense_replace for layer in layers),
            num_nextn_predict_layers=model.num_nextn_predict_layers if is_last else 0,
            vocab_size=model.vocab_size if is_first or is_last else 0,
            tie_word_embeddings=model.tie_word_embeddings or not (is_first and is_last),
        )
        kept = {"1f1b": ranks - rank, "zbv": ranks, "dualpipev": ranks + 0.5}[schedule]
        edges = 2 * len(own) - is_first - is_last
        states = model.hidden_size * (2 if model.num_nextn_predict_layers else 1)  # with the embedded tokens
        found.append(Cut(share, min(kept, micro_batches), edges * states, 1 / len(own)))
    return found
