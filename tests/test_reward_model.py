"""Reward models: losses by hand, no influence of padding, what each kind reads, checkpoints, the stage."""

import gc
import json
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from tiny_runs import load_stage, tiny_config, tiny_run

from r1pipe.chat.template import Chat, compose_response
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Completion, Prompt
from r1pipe.model import DeepseekV3
from r1pipe.rewards import models
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL, KINDS, quality_of
from r1pipe.train.engine.engine import Engine
from r1pipe.train.loading import load_policy
from r1pipe.train.rl import reward_model
from r1pipe.train.rl.reward_model import Examples, Item, in_micro_batches, measure_quality, micro_losses

PROMPT = Prompt("p", "writing", "en", "Write about a fox.")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(content_dir() / "tokenizer")


def random_model() -> models.RewardModel:
    model = models.RewardModel(DeepseekV3(tiny_config("stage=reward_model").model))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    return model


def test_losses_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert models.bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    scores, safe = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    assert models.point_wise_loss(scores, safe).item() == pytest.approx(expected)


def test_bradley_terry_pulls_the_pair_apart_most_where_it_is_wrong():
    chosen = torch.tensor([0.0, -3.0], requires_grad=True)
    models.bradley_terry_loss(chosen, torch.zeros(2)).backward()
    assert chosen.grad.tolist() == pytest.approx([-0.25, -0.5 / (1 + math.exp(-3))])


def test_a_score_does_not_depend_on_the_batch_it_comes_in(chat):
    model = random_model()
    rows = [chat.encode("one two three four five " * n) for n in (1, 7, 3)]
    together = models.score_rows(model, rows, chat.pad_id)
    alone = [models.score_rows(model, [row], chat.pad_id)[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == 3


def test_helpful_reads_the_summary_alone_and_harmless_all(chat):
    one, other = (compose_response(reasoning, "A fox ran.") for reasoning in ("Plan.", "Quite another plan."))
    helpful, harmless = (
        [models.scored_tokens(kind, chat, PROMPT, text) for text in (one, other)] for kind in KINDS
    )
    assert helpful[0] == helpful[1] == chat.example(PROMPT, "A fox ran.").tokens
    assert helpful[0][-1] == chat.eos_id
    assert harmless[0] != harmless[1] and harmless[0] == chat.example(PROMPT, one).tokens


def test_what_has_no_summary_or_no_end_earns_nothing(chat):
    judge = models.RewardScorer(random_model(), HELPFUL, chat)
    good = compose_response("Plan.", "A fox ran.")
    texts = [(good, "stop"), (good, "length"), ("A fox ran.", "stop"), ("<think>\nPlan.", "stop")]
    completions = [Completion([], [], reason, text) for text, reason in texts]
    values = [score.value for score in judge([PROMPT] * 4, completions)]
    assert 0 < values[0] < 1 and values[1:] == [0.0, 0.0, 0.0]


def test_a_response_that_is_likely_safe_earns_as_much_as_one_that_is_surely_safe(chat):
    """Otherwise a refusal would earn more than a safe answer to a safe wish."""
    model = random_model()
    earned = []
    for bias in (-3.0, 0.2, 6.0):
        with torch.no_grad():
            model.score.weight.zero_()
            model.score.bias.fill_(bias)
        judge = models.RewardScorer(model, HARMLESS, chat)
        earned.append(judge([PROMPT], [Completion([], [], "stop", "A fox ran.")])[0].value)
    assert earned == [pytest.approx(2 / (1 + math.exp(3.0)), rel=1e-4), 1.0, 1.0]


def test_garbage_that_grows_when_encoded_again_is_not_judged(chat):
    model = random_model()
    longest = model.config.max_position_embeddings
    text = chat.decode([chat.encode("\u00e9")[0]] * (longest // 2))
    assert len(chat.encode(text)) > longest, "a byte that is no character becomes three"
    texts = [text, "A fox ran."]
    scores = models.RewardScorer(model, HARMLESS, chat)(
        [PROMPT] * 2, [Completion([], [], "stop", text) for text in texts]
    )
    assert scores[0].value == 0.0 < scores[1].value


def test_standardised_scores_have_mean_0_and_deviation_1(chat):
    model = random_model()
    rows = [chat.encode("word " * n) for n in range(1, 9)]
    models.standardise(model, models.score_rows(model, rows, chat.pad_id))
    scores = torch.tensor(models.score_rows(model, rows, chat.pad_id))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_a_saved_model_scores_the_same_and_a_damaged_one_is_named(tmp_path, chat):
    model, rows = random_model(), [chat.encode("a fox"), chat.encode("the answer is 4")]
    models.save_reward_model(model, tmp_path)
    loaded = models.load_reward_model(tmp_path)
    assert models.score_rows(loaded, rows, chat.pad_id) == models.score_rows(model, rows, chat.pad_id)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForSequenceClassification"]
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        models.load_reward_model(tmp_path)


def test_quality_by_hand():
    assert models.pair_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 3.0, 3.0, -1.0]) == pytest.approx(2.5 / 4)
    assert models.auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert models.auc([1.0, 1.0], [True, False]) == 0.5
    assert models.auc([1.0, 2.0], [True, True]) is None
    assert models.length_correlation([1.0, 2.0, 3.0], [30, 20, 10]) == pytest.approx(-1.0)
    assert models.length_correlation([1.0, 1.0], [1, 2]) is None


def test_a_models_standing_counts_the_responses_length_and_not_the_prompts(monkeypatch):
    scores = {5: 1.0, 6: 2.0, 7: 3.0, 8: 0.0}
    monkeypatch.setattr(models, "score_rows", lambda model, rows, pad_id: [scores[row[-1]] for row in rows])
    pairs = [
        Item([[1, 1, 1, 1, 1, 5, 5], [1, 1, 1, 1, 1, 8]], prompt=5),
        Item([[1, 7, 7, 7, 7], [1, 6, 6, 6]], 1),
    ]
    found, kept = measure_quality(None, HELPFUL, pairs, 0)
    assert kept == [1.0, 0.0, 3.0, 2.0] and (found["pairs"], found["accuracy"]) == (2, 1.0)
    assert found["length_correlation"] == pytest.approx(1.0), "lengths 2, 1, 4, 3"
    labels = [Item([row], 1, safe) for row, safe in (([1, 7], True), ([1, 8, 8], False), ([1, 5], False))]
    found, _ = measure_quality(None, HARMLESS, labels, 0)
    assert (found["labels"], found["auc"], found["accuracy"]) == (3, 1.0, pytest.approx(2 / 3))
    assert found["length_correlation"] < 0


@pytest.mark.parametrize(
    ("accumulation", "most", "expected"),
    [
        (1, 100, [[9, 5, 4, 2]]),
        (2, 100, [[9, 5], [4, 2]]),
        (1, 36, [[9, 5], [4, 2]]),
        (1, 8, [[9], [5], [4], [2]]),
    ],
)
def test_pairs_are_read_together_up_to_so_many_tokens(accumulation, most, expected):
    pairs = [Item([[1] * n, [1]]) for n in (4, 9, 2, 5)]
    micros = in_micro_batches(pairs, accumulation, most)
    assert [[len(item) for item in micro] for micro in micros] == expected


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_loads_count_the_responses_and_no_padding(alpha):
    model = models.RewardModel(tiny_model())
    engine = Engine(model, OPTIM, replace(ROUTER, balance_alpha=alpha), engine_config(), total_steps=10)
    items = [Item([[5, 6, 7, 8][:n], [9, 3]]) for n in (4, 1, 3)]
    examples = Examples(HELPFUL, items, [], 0)
    stats = engine.train_step(micro_losses(engine, examples, [items[:2], items[2:]], alpha))
    assert stats.loads_LE.sum(1).tolist() == [2 * (4 + 1 + 3 + 3 * 2)]  # two experts a token


def test_the_stage_learns_both_and_resumes_between_them(tmp_path, monkeypatch):
    stage = load_stage("reward_model")
    overrides = (
        *(
            "stage=reward_model",
            "stage.pairs=64",
            "stage.labels=64",
            "stage.held_out=64",
            "stage.batch_size=16",
        ),
        *(
            "stage.max_steps=0",
            "stage.epochs=4",
            "stage.optim.lr=0.003",
            "stage.save_every=8",
            "stage.keep=9",
        ),
    )
    whole, broken = (tiny_run(tmp_path / name, *overrides) for name in ("whole", "broken"))
    stage.main(str(whole))
    trained = stage.train_reward_model
    calls = []

    def killed(run, examples, first, steps, resumes):
        calls.append(examples.kind)
        if examples.kind == HARMLESS and len(calls) == 2:
            raise KeyboardInterrupt
        trained(run, examples, first, steps, resumes)

    monkeypatch.setattr(stage, "train_reward_model", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.main(str(broken))
    stage.main(str(broken))
    for kind in KINDS:
        files = [
            folder / "checkpoints" / "step-32" / kind / "model.safetensors" for folder in (whole, broken)
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), kind
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 33))
    found = json.loads((whole / "evaluation.json").read_text())["reward_models"]
    assert found["helpful"]["pairs"] == found["harmless"]["labels"] == 64
    assert found["helpful"]["accuracy"] > 0.55 and found["harmless"]["auc"] > 0.6
    assert all(-1 <= found[kind]["length_correlation"] <= 1 for kind in KINDS)
    assert quality_of(whole / "checkpoints" / "step-32") == found, "what the next stage judges them by"


def test_a_model_is_freed_with_its_optimizer_before_the_next_is_loaded(tmp_path, monkeypatch):
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Watched(Engine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.extend(map(weakref.ref, (self, self.module, self._ds.optimizer)))

    def load(run):
        alive.append(sum(one() is not None for one in made))
        return load_policy(run)

    monkeypatch.setattr(reward_model, "Engine", Watched)
    monkeypatch.setattr(reward_model, "load_policy", load)
    small = ("stage.pairs=8", "stage.labels=8", "stage.held_out=8", "stage.batch_size=8", "stage.max_steps=1")
    folder = tiny_run(tmp_path / "run", "stage=reward_model", *small)
    gc.disable()
    try:
        load_stage("reward_model").main(str(folder))
    finally:
        gc.enable()
    assert alive == [0, 0] and len(made) == 6
