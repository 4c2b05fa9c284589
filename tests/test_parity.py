"""The same function as transformers: logits within 1e-4 everywhere, gradients within 1e-4 of their norm.

All in float32, the reference with eager experts and attention, weights random, routing biases of both signs.
"""

from collections.abc import Iterator

import pytest
import torch
from shapes import SHAPES, V2_SHAPES, ours
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from r1pipe.model import DeepseekV3
from r1pipe.model.moe import Gate, gates
from r1pipe.model.names import published_config

LOGITS = 1e-4  # absolute, at every position
GRADIENTS = 1e-4  # ||g - g'|| / ||g'|| of every parameter
APART = 1e-5  # scores closer than this could be chosen otherwise by another order of the same sums
ALL = SHAPES | V2_SHAPES
CLASSES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
}


def theirs(model: DeepseekV3):
    """The same weights in transformers, which reads our config.json and knows our tensor names."""
    published = published_config(model.config, torch.float32)
    config_class, model_class = CLASSES[published["model_type"]]
    config = config_class(**published, attn_implementation="eager", experts_implementation="eager")
    other = model_class(config).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    return other


def near_tie(gate: Gate, x_ND: torch.Tensor) -> bool:
    """Whether rounding could change a choice: of an expert, or of a group."""
    config = gate.config
    logits_NE = x_ND @ gate.weight.T
    scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(-1)
    if config.topk_method == "noaux_tc":
        scores_NE = scores_NE + gate.e_score_correction_bias
    gaps = []
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        best = 2 if config.topk_method == "noaux_tc" else 1
        groups_NG = scores_NE.unflatten(-1, (config.n_group, -1)).topk(best).values.sum(-1)
        ordered_NG = groups_NG.sort(descending=True)
        gaps.append(ordered_NG.values[:, config.topk_group - 1] - ordered_NG.values[:, config.topk_group])
        open_NG = torch.zeros_like(groups_NG).scatter_(1, ordered_NG.indices[:, : config.topk_group], 1.0)
        open_NE = open_NG.repeat_interleave(config.n_routed_experts // config.n_group, dim=1).bool()
        scores_NE = scores_NE.masked_fill(~open_NE, float("-inf"))
    kept = config.num_experts_per_tok
    ordered_NE = scores_NE.sort(descending=True).values
    gaps.append(ordered_NE[:, kept - 1] - ordered_NE[:, kept])
    return min(gap.min().item() for gap in gaps) < APART


@torch.no_grad()
def drawn(model: DeepseekV3, rows: int, length: int) -> torch.Tensor:
    """Tokens at which no choice hangs on rounding: the first draw of several that is so."""
    for seed in range(20):
        tokens_BT = torch.randint(
            1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
        )
        close: list[bool] = []

        def look(gate: Gate, inputs: tuple[torch.Tensor], close: list[bool] = close) -> None:
            close.append(near_tie(gate, inputs[0]))

        hooks = [gate.register_forward_pre_hook(look) for gate in gates(model)]
        model(tokens_BT)
        for hook in hooks:
            hook.remove()
        if not any(close):
            return tokens_BT
    raise AssertionError("every draw has a near tie")


def weights_like(logits: torch.Tensor) -> torch.Tensor:
    """What makes a scalar of logits that every one of them has a part in."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) / logits.numel() ** 0.5


def differences(model: DeepseekV3, other) -> Iterator[tuple[str, float]]:
    """||g - g'|| / ||g'|| of every parameter."""
    for (name, mine), (same, reference) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == same and reference.grad.norm() > 0
        yield name, ((mine.grad - reference.grad).norm() / reference.grad.norm()).item()


def must_equal(model: DeepseekV3, other, mine: torch.Tensor, reference: torch.Tensor) -> None:
    """Logits [..., V], and the gradients of one scalar of them."""
    assert reference.std() > 0.3
    torch.testing.assert_close(mine, reference, atol=LOGITS, rtol=0)
    weight = weights_like(mine)
    (mine * weight).sum().backward()
    (reference * weight).sum().backward()
    assert {name: d for name, d in differences(model, other) if d > GRADIENTS} == {}


@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients_equal_transformers(name):
    model = ours(ALL[name])
    if model.config.topk_method == "noaux_tc":
        for gate in gates(model):
            assert gate.e_score_correction_bias.min() < 0 < gate.e_score_correction_bias.max()
            assert (gate.e_score_correction_bias != 0).all()
    other, tokens_BT = theirs(model), drawn(model, 2, 64)
    must_equal(model, other, model(tokens_BT), other(tokens_BT).logits)


@pytest.mark.parametrize("name", ["v3_yarn", "yarn_mscale", "v2_lite"])
def test_yarn_equals_transformers_up_to_four_times_the_original_length(name):
    model = ours(ALL[name])
    length = 4 * model.config.rope_scaling.original_max_position_embeddings
    other, tokens_BT = theirs(model), drawn(model, 1, length)
    must_equal(model, other, model(tokens_BT), other(tokens_BT).logits)


@pytest.mark.parametrize("name", ["v3_groups", "v3_yarn", "moonlight", "v2_lite"])
def test_padded_rows_equal_transformers_with_its_mask(name):
    model = ours(ALL[name])
    other, tokens_BT = theirs(model), drawn(model, 4, 24)
    there_BT = torch.arange(24) < torch.tensor([[24], [17], [9], [1]])
    mine = model(tokens_BT, there_BT.long())
    reference = other(tokens_BT, attention_mask=there_BT.long()).logits
    must_equal(model, other, mine[there_BT], reference[there_BT])


@pytest.mark.parametrize("name", ["v3_groups", "v3_yarn", "moonlight", "v2_lite"])
def test_packed_documents_equal_transformers_on_each_alone(name):
    model = ours(ALL[name])
    other, (tokens_T,) = theirs(model), drawn(model, 1, 32)
    lengths = [5, 17, 1, 9]
    numbers = [torch.full((n,), i + 1) for i, n in enumerate(lengths)]
    segments = torch.cat([*numbers, torch.zeros(4, dtype=torch.long)])
    packed = torch.cat([tokens_T, torch.zeros(4, dtype=torch.long)])
    logits_TV = model(packed.unsqueeze(0), segments.unsqueeze(0))[0]
    assert logits_TV.isfinite().all()
    alone = [other(document.unsqueeze(0)).logits[0] for document in tokens_T.split(lengths)]
    must_equal(model, other, logits_TV[:32], torch.cat(alone))
