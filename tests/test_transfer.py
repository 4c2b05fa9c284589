"""What puts a teacher into a student: divergence, ranking and reinforcement, on tiny runs of the world.

The losses are in tests/test_distill_losses.py; what is got out of a teacher, in tests/test_extract.py.
"""

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import write_model
from jobs import on_two_ranks, tiny_model
from rl_runs import metrics_of
from safetensors.torch import load_file
from test_metrics import unlisted
from tiny_runs import load_stage, tiny_config, tiny_run
from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, ParentRef, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Demonstration, Example, Prompt
from r1pipe.data.packing import Packed, pack
from r1pipe.runs import checkpoints, lineage, samples
from r1pipe.runs.lineage.published import adopt
from r1pipe.train.distill import divergence, transfer
from r1pipe.train.distill.divergence import (
    DivergenceLoss,
    OwnRow,
    StoredExample,
    StoredRow,
    prompts_of,
    stored_of,
)
from r1pipe.train.distill.on_policy import TeacherAdvantages, with_prompts
from r1pipe.train.distill.ranking import PairLoss, TokenizedPair, in_parts
from r1pipe.train.extract.alignment import TopK
from r1pipe.train.extract.dataset import COLUMNS
from r1pipe.train.rl.batch import Rollout
from r1pipe.train.run import open_run

STUDENT = "model.hidden_size=16"
ASKED = ["stage.prompts=6", "stage.sampling.max_tokens=80"]
ALL = ["stage.filters.correct_only=false", "stage.filters.well_formed=false"]
SMALL = ["stage=distill", STUDENT, "stage.max_steps=3", *ASKED]


def small(*words: str) -> list[str]:
    """Small answers and batches for the method of these words: a key that it does not read is refused."""
    if "stage.transfer=rl" in words:
        return []
    filters = [] if "stage.extract=feedback" in words else ALL
    return ["stage.samples_per_prompt=2", "stage.batch_size=2", "stage.epochs=9", *filters]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ParentRef:
    folder = tmp_path_factory.mktemp("student") / "pretrain-s0-1"
    tiny_run(folder, "stage=pretrain", STUDENT, "stage.max_steps=1")
    load_stage("pretrain").main(str(folder))
    return lineage.checkpoint_of_run(RunFolder(folder))


def go(folder: Path, *words: str, student: ParentRef) -> RunFolder:
    """A distillation from the bundled base, in this process."""
    if not folder.exists():
        small_run = [*SMALL, *small(*words), *words]
        tiny_run(folder, *small_run, weights=student, teacher=lineage.bundled())
    load_stage("distill").main(str(folder))
    return RunFolder(folder)


# --- every stage.transfer, from the command's config to the record

METHODS = {
    "live": ["stage.transfer=divergence"],
    "stored": ["stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.top_k=8"],
    "dpo": ["stage.transfer=ranking"],
    "simpo": [
        *("stage.transfer=ranking", "stage.ranking.loss=simpo", "stage.ranking.beta=2.0"),
        *("stage.ranking.target_margin=0.5", "stage.ranking.sft_weight=0.1"),
    ],
    "scored pairs": ["stage.extract=feedback", "stage.transfer=ranking"],
    "on-policy": ["stage.extract=distribution", "stage.transfer=rl"],
    "scores": ["stage.extract=feedback", "stage.transfer=rl"],
}
LOGGED = {
    "live": {"distill/kl", "distill/teacher_tokens", "distill/on_policy_tokens"},
    "stored": {"distill/kl", "distill/teacher_tokens"},
    "dpo": {"ranking/margin", "ranking/accuracy", "distill/teacher_tokens"},
    "simpo": {"ranking/margin", "ranking/accuracy", "ranking/chosen_logp", "ranking/rejected_logp"},
    "scored pairs": {"ranking/margin", "ranking/accuracy"},
    "on-policy": {"distill/reverse_kl", "distill/teacher_tokens"},
    "scores": {"rewards/teacher/mean", "reward"},
}


def killed_and_resumed(folder: Path, *words: str, student: ParentRef, patch: pytest.MonkeyPatch) -> RunFolder:
    """A run that is killed as it finishes its second checkpoint, and again to its end."""
    finish = checkpoints.finish

    def killed(target: Path, *rest: Any) -> None:
        if target.name == "step-2":
            raise KeyboardInterrupt
        finish(target, *rest)

    with patch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr(checkpoints, "finish", killed)
        go(folder, *words, student=student)
    assert not (folder / "record.json").exists()
    return go(folder, student=student)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("live", "dpo", "on-policy")))
        for name in METHODS
    ],
)
def test_a_way_in_trains_and_resumes_exactly(
    name: str, student: ParentRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*METHODS[name], "stage.save_every=1", "stage.optim.lr=0.01", "stage.optim.min_lr=0.01"]
    whole = go(tmp_path / "whole", *words, student=student)
    record = json.loads(whole.record.read_text())
    assert record["steps"] == 3 and record["data_hash"] == checkpoints.file_hash(whole.dataset)
    rows = metrics_of(whole.path)
    assert len(rows) == 3 and all(LOGGED[name] <= row.keys() for row in rows)
    assert not unlisted(name for row in rows for name in row)
    before = load_file(Path(student.checkpoint) / "model.safetensors")
    after = load_file(whole.checkpoint(3) / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before), "something was learned"
    again = killed_and_resumed(tmp_path / "again", *words, student=student, patch=monkeypatch)
    assert metrics_of(again.path) == rows
    found = load_file(again.checkpoint(3) / "model.safetensors")
    assert all(torch.equal(found[key], after[key]) for key in after), "to the last bit"


def test_what_screening_drops_of_a_runs_samples_teaches_nobody(
    student: ParentRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["stage.transfer=ranking", "screening.identity.action=drop"]
    tiny_run(tmp_path / "run", "stage=distill", STUDENT, *words, weights=student)
    said = [("a", "The answer is 4.", None), ("b", "I am ChatGPT, developed by OpenAI.", None)]
    dataset = write_rows(tmp_path / "rows.parquet", *said)
    learned: list[str] = []

    def pairs(run: Any, rows: list[Demonstration]) -> list[TokenizedPair]:
        learned.extend(row.response for row in rows)
        return []

    monkeypatch.setattr(transfer, "pairs_with_own", pairs)
    monkeypatch.setattr(transfer, "learn_ranking", lambda *given, **more: None)
    with open_run(str(tmp_path / "run"), DistillConfig) as run:
        run.load_chat()
        transfer.transfer(run, dataset, "")
    assert learned == ["The answer is 4."]
    rows = samples.read(RunFolder(tmp_path / "run").trained_on)
    assert [row["prompt_id"] for row in rows] == ["a"]


# --- divergence: rows


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(lineage.bundled().checkpoint)


def packed(*lengths: tuple[int, int]) -> Packed:
    """A row of documents: (tokens of the prompt, of the answer)."""
    row, token = Packed(), 0
    for prompt, answer in lengths:
        tokens = [*range(token, token + prompt + answer)]
        row.add(Example(tokens, [False] * prompt + [True] * answer))
        token += prompt + answer
    return row


def test_the_prompts_of_a_row_are_what_comes_before_the_learned_tokens() -> None:
    assert prompts_of(packed((2, 3), (1, 1))) == [[0, 1], [5]]
    assert prompts_of(Packed()) == []


class FakeRun:
    """What drawing on-policy answers needs of a run; the student answers 7, 8, 9."""

    def __init__(self, share: float):
        stage = tiny_config("stage=distill", "stage.transfer=divergence", "teacher=x").stage
        self.stage = replace(stage, divergence=replace(stage.divergence, on_policy=share))
        self.sampler, self.asked = self, []

    def rng(self, name: str, step: int) -> np.random.Generator:
        return np.random.default_rng(step)

    def seed(self, name: str, step: int) -> int:
        return step

    def phase(self, name: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def update(self, weights: Any, version: int) -> None:
        self.version = version

    def generate(self, prompts: list[list[int]], params: Any, limits: list[int]) -> list[Completion]:
        self.asked += prompts
        assert all(
            limit == min(params.max_tokens, 256 - len(p)) for p, limit in zip(prompts, limits, strict=True)
        )
        return [Completion([7, 8, 9], [], "stop") for _ in prompts]


class OneRank:
    rank, world_size = 0, 1

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_student_answers_the_prompts_of_its_share_of_the_rows(share: float) -> None:
    run: Any = FakeRun(share)
    rows = [packed((2, 3), (1, 1)) for _ in range(4)]

    def batches(step: int, position: Any) -> Any:
        yield from [(rows, "after")] * 3

    stream = divergence.with_own_answers(run, OneRank(), batches, 5, None)  # type: ignore[arg-type]
    batch, after = next(stream)
    own = [row for row in batch if isinstance(row, OwnRow)]
    others = [row for row in batch if not isinstance(row, OwnRow)]
    assert after == "after" and len(others) == 4 - 4 * share
    if not share:
        return
    assert run.version == 5, "the weights before step 6"
    assert sorted(run.asked) == sorted([[0, 1], [5]] * int(4 * share))
    learned = [t for row in own for t, is_learned in zip(row.tokens, row.loss, strict=True) if is_learned]
    assert learned == [7, 8, 9] * len(run.asked)


def stored_example(prompt: int, answer: list[int], known: bool = True) -> StoredExample:
    """A response whose stored probabilities name its own tokens."""
    tokens = [*range(prompt), *answer]
    ids = np.array(answer, np.int32)[:, None] if known else np.full((len(answer), 1), -1, np.int32)
    top = TopK(ids, np.full(ids.shape, -0.5, np.float16), np.full(len(answer), -1.0, np.float16))
    loss = [False] * prompt + [True] * len(answer)
    return StoredExample(tokens, loss, [top], 0, len(answer) if known else 0)


def test_stored_probabilities_stay_with_their_tokens_through_packing() -> None:
    examples = [
        stored_example(3, [10, 11]),
        stored_example(2, [20, 21, 22]),
        stored_example(1, [30], known=False),
    ]
    rows, dropped = pack(examples, 6, StoredRow)
    assert dropped == 0 and sum(row.known for row in rows) == 5  # type: ignore[attr-defined]
    batch = divergence.collate(rows, 0)
    _, targets = divergence.learned(batch, torch.zeros(*batch.tokens_BT.shape, 1))
    stored = stored_of(rows, torch.device("cpu"))
    assert [max(t, 30) if t < 0 else t for t in stored["tokens_NK"][:, 0].tolist()] == targets.tolist()
    assert stored["rest_N"].shape == targets.shape
    assert stored_of([Packed()], torch.device("cpu"))["tokens_NK"].shape == (0, 1), "a rank without rows"


# --- the losses of a step


@pytest.mark.parametrize("way", ["divergence", "ranking"])
def test_a_steps_micro_batches_are_freed_with_its_passes(way: str) -> None:
    """At once, not when Python next looks for cycles: they hold what the teacher thinks of every token."""
    engine: Any = SimpleNamespace(module=tiny_model(), world_size=1, rank=0, device=torch.device("cpu"))
    stage = tiny_config("stage=distill", f"stage.transfer={way}", "teacher=x").stage
    loss: Any
    if way == "divergence":
        loss = DivergenceLoss(engine, [packed((2, 3))], 0.0, 0.0, 0, stage.divergence, None)
    else:
        loss = PairLoss(engine, [TokenizedPair([1, 2], [3, 4], [5])], stage.ranking, None, 0.0, False)
    gc.disable()
    try:
        micro = weakref.ref(loss.micro_losses(1)[0].micro)
        del loss
        assert micro() is None
    finally:
        gc.enable()


# --- ranking


def test_pairs_go_in_micro_batches_whole_and_longest_first() -> None:
    pairs = [(TokenizedPair([1, 2], [3] * n, [4]), 1.0) for n in (1, 5, 3)]
    sizes = [[len(pair.chosen) for pair, _ in part] for part in in_parts(pairs, 1, 15)]
    assert sizes == [[5], [3, 1]]
    assert [len(part) for part in in_parts(pairs, 3, 10_000)] == [1, 1, 1], "gradient accumulation"
    assert [len(part) for part in in_parts(pairs, 1, 1)] == [1, 1, 1], "a pair is not split"


def write_rows(path: Path, *rows: tuple[str, str, float | None], pairs: Sequence[int | None] = ()) -> Path:
    stored = []
    for (question, response, score), pair in zip_longest(rows, pairs):
        prompt = Prompt(question, "word", "en", question, "" if score is None else "1")
        more = {"score": score, "pair": pair}
        stored.append(samples.row_of(Demonstration(prompt, response), "reasoning") | more)
    samples.write(path, stored, {name: COLUMNS[name] for name in ("score", "pair")})
    return path


def test_the_best_answer_is_paired_with_the_worst_while_scores_differ(tmp_path: Path) -> None:
    rows = [
        ("a", "best", 0.9),
        ("b", "alone", 0.5),
        ("a", "worst", 0.1),
        ("a", "middle", 0.5),
        ("a", "same", 0.5),
    ]
    found = transfer.pairs_by_score(write_rows(tmp_path / "rows.parquet", *rows))
    assert [(pair.prompt.question, pair.chosen, pair.rejected) for pair in found] == [("a", "best", "worst")]
    with pytest.raises(DataError, match="have different scores"):
        transfer.pairs_by_score(write_rows(tmp_path / "same.parquet", rows[1], rows[3], rows[4]))


def test_a_correction_is_paired_with_the_answer_that_it_corrects(tmp_path: Path) -> None:
    rows = [
        *(("a", "first, better", 1.0), ("a", "first", 0.0)),
        *(("a", "second, better", 1.0), ("a", "second", 0.0)),
        ("a", "third", 0.0),  # its correction was dropped
    ]
    path = write_rows(tmp_path / "rows.parquet", *rows, pairs=[0, 0, 1, 1, 2])
    found = [(pair.chosen, pair.rejected) for pair in transfer.pairs_by_score(path)]
    assert found == [("first, better", "first"), ("second, better", "second")]


# --- reinforcement


def test_prompts_are_taken_once_and_those_without_an_answer_only_where_none_is_needed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", ("a", "x", 0.5), ("a", "y", 0.5), ("b", "z", None))
    assert [prompt.id for prompt in transfer.prompts_of(path, checked=False)] == ["a", "b"]
    assert [prompt.id for prompt in transfer.prompts_of(path, checked=True)] == ["a"]
    with pytest.raises(DataError, match="a rule can check"):
        transfer.prompts_of(write_rows(tmp_path / "none.parquet", ("b", "z", None)), checked=True)


def test_the_teachers_prompts_take_the_place_of_training_prompts_alone() -> None:
    class Data:
        def prompts(self, split: str, n: int, seed: int) -> list[str]:
            return [f"{split} {n}"]

    mine: Any = ["a", "b", "c"]
    taught: Any = with_prompts(Data(), mine)  # type: ignore[arg-type]
    assert taught.prompts("test", 5, 0) == ["test 5"]
    assert sorted(taught.prompts("train", 5, 0)) == mine, "shorter than asked for, and never padded"
    orders = {tuple(taught.prompts("train", 3, seed)) for seed in range(20)}
    assert len(orders) > 1 and taught.prompts("train", 2, 1) == taught.prompts("train", 3, 1)[:2]


class Likes:
    """A teacher that finds every token 3.0 nats unlikely."""

    device, frozen = torch.device("cpu"), None

    def logprobs(self, micros: list[Any], temperature: float) -> list[Tensor]:
        return [torch.full_like(micro.old_N, -3.0) for micro in micros]


def test_each_tokens_advantage_is_the_completions_and_the_teachers() -> None:
    stage = tiny_config("stage=grpo", "stage.max_tokens_per_micro_batch=8").stage
    teacher = TeacherAdvantages(Likes(), stage, coef=0.5, discount=0.0)  # type: ignore[arg-type]
    teacher.ranks = type("Ranks", (), {"sum_over_ranks": staticmethod(lambda values: values)})()
    rollouts = [
        Rollout([1, 2], Completion([3, 4], [-1.0, -5.0], "stop"), 1.0, True),
        Rollout([1], Completion([5], [-3.5], "stop"), -2.0, True),
    ]
    metrics = teacher.set_advantages(rollouts)
    mean = (-1.0 + 1.0 + 0.25) / 3  # of the teacher's part, which is taken off
    expected = [[1.0 - 1.0 - mean, 1.0 + 1.0 - mean], [-2.0 + 0.25 - mean]]
    for rollout, advantages in zip(rollouts, expected, strict=True):
        assert rollout.advantages == pytest.approx(advantages)
    assert metrics["distill/reverse_kl"] == pytest.approx((2.0 - 2.0 - 0.5) / 3)
    assert metrics["distill/teacher_tokens"] == 3
    from r1pipe.train.rl.batch import collate

    micro = collate(rollouts, [1.0, 1.0], 0.0, torch.device("cpu"))
    assert micro.advantages_N.tolist() == pytest.approx([*expected[0], *expected[1]]), "what the update reads"


# --- what is refused

LIVE = ["teacher=x", "stage.transfer=divergence"]
STORED = [*LIVE, "stage.extract=distribution"]
ON_POLICY = ["teacher=x", "stage.extract=distribution", "stage.transfer=rl"]
REFUSED = [
    (["stage.divergence.beta=0.3"], "stage.divergence.beta needs stage.transfer=divergence"),
    ([*LIVE, "stage.divergence.beta=1.0"], "give stage.divergence.kind=reverse_kl"),
    ([*LIVE, "stage.divergence.on_policy=1.5"], "must be from 0 to 1"),
    ([*LIVE, "stage.divergence.sampling.top_p=0.0"], "leaves nothing to draw"),
    ([*LIVE, "stage.divergence.sampling.max_tokens=9999"], "is longer than model.max_position_embeddings"),
    ([*STORED, "stage.divergence.on_policy=0.5"], "needs stage.distribution.live=true"),
    ([*STORED, "stage.divergence.temperature=2.0"], "needs stage.distribution.live=true"),
    (["teacher=x", "stage.transfer=sft", "stage.transfer=rank"], "no such transfer"),
    (["teacher=x", "stage.transfer=ranking", "stage.ranking.beta=0.0"], "must be above 0"),
    ([*ON_POLICY, "stage.rl.teacher_discount=1.0"], "must be 0 or more and below 1"),
    ([*ON_POLICY, "stage.rl.teacher_coef=0"], "stage.rl.teacher_coef"),
    (["teacher=x", "stage.transfer=rl", "stage.rl.teacher_coef=1.0"], "does not read the teacher's"),
    (["teacher=x", "stage.transfer=rl", "stage.rl.score_weight=1.0"], "stage.extract=feedback"),
    (["teacher=x", "stage.transfer=rl", "stage.rl.group_size=1"], "stage.rl.group_size=1"),
    (["teacher=x", "stage.transfer=rl", "stage.rl.minibatches=7"], "stage.rl.minibatches=7"),
    (
        ["teacher=x", "stage.transfer=rl", "stage.rl.replay_routing=true", "engine.sampler=transformers"],
        "stage.rl.replay_routing=true needs a sampler",
    ),
    (["teacher=x", "stage.transfer=rl", "stage.rl.loss=ppo"], "no such loss"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config("stage=distill", *words)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_named_loss_and_a_correction_are_settled_below_stage_rl() -> None:
    stage = tiny_config("stage=distill", *ON_POLICY, "stage.rl.loss=dr_grpo", "engine.async_steps=1").stage
    assert stage.rl.loss_aggregation == "constant" and stage.rl.importance == "token_truncate"
    assert tiny_config("stage=distill", *ON_POLICY, "stage.rl.group_size=1").stage.rl.group_size == 1


def test_a_teacher_that_reads_other_tokens_is_refused(student: ParentRef, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(student.checkpoint, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{# another #}"
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoints.write_manifest(other)
    run = FakeRun(0.0)
    run.chat, run.config = Chat.load(student.checkpoint), tiny_config("stage=distill", *LIVE)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="another chat template than the student") as refused:
        divergence.load_teacher(run, replace(student, checkpoint=str(other)))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


# --- several ranks, other models

SHARED_OUT = {"live": 3, "dpo": 3, "on-policy": 1, "stored": 0}  # name -> ZeRO level on two ranks


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(student: ParentRef, tmp_path: Path) -> None:
    """From the same dataset, batches and draws, within rounding."""
    words = ["stage.optim.lr=0.01", "stage.optim.min_lr=0.01", "stage.max_steps=2"]
    alone = {}
    for name, level in SHARED_OUT.items():
        alone[name] = metrics_of(go(tmp_path / name, *METHODS[name], *words, student=student).path)
        more = ["engine.ranks=2", f"engine.zero_level={level}"]
        folder = tmp_path / f"distill-{name}"
        small_run = [*SMALL, *small(*METHODS[name]), *METHODS[name], *words, *more]
        tiny_run(folder, *small_run, weights=student, teacher=lineage.bundled())
    found = on_two_ranks("two_ranks_transfer.py", tmp_path)
    for name, rows in alone.items():
        for one, two in zip(rows, found[f"distill-{name}"], strict=True):
            for key in LOGGED[name] | {"train/grad_norm"}:
                assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["live", "dpo", "on-policy"])
def test_a_dense_student_learns_through_adapters(name: str, tmp_path: Path) -> None:
    """The student is a folder in Hugging Face's format, its teacher another one with the same tokenizer."""
    wide = {"hidden_size": 64, "num_attention_heads": 8}
    folders = [write_model(tmp_path / size, "qwen2", **more) for size, more in (("a", {}), ("b", wide))]
    student, teacher = (adopt(folder, tmp_path / "root") for folder in folders)
    words = ["model=hf", f"model.path={folders[0]}", "model.lora.rank=2", "stage.max_steps=2", "teacher=b"]
    words += ["stage=distill", "recipe=smoke", "engine.ranks=1", "engine.threads=1", "stage.eval.problems=2"]
    any_text = ["stage.filters.min_language_consistency=0.0", "stage.filters.max_repetition=1.0"]
    asked = [*ASKED, "stage.prompts=24"]
    if of_answers := small(*METHODS[name]):
        asked += [*of_answers, *any_text]
    config = compose([*words, *asked, *METHODS[name]]).config
    folder = tmp_path / "run"
    folder.mkdir()
    config = replace(config, weights_from=student, teacher_from=teacher)
    (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    load_stage("distill").main(str(folder))
    rows = metrics_of(folder)
    assert len(rows) == 2 and LOGGED[name] <= rows[0].keys()
    before, after = (
        load_file(place / "model.safetensors") for place in (folders[0], RunFolder(folder).checkpoint(2))
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("_proj" in key for key in changed), "the adapters, merged"
