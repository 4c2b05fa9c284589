"""Supervised training: the loss is of responses alone, packing changes nothing, resume repeats nothing."""

import gc
import json
import math
import weakref
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run

from r1pipe.chat.template import Chat
from r1pipe.config import ParentRef
from r1pipe.core.errors import DataError
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Completion, Demonstration, Message, Prompt
from r1pipe.data import open_data
from r1pipe.data.packing import Batch, Packed, collate
from r1pipe.model import DeepseekV3
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import HELD_OUT
from r1pipe.train.run import open_run
from r1pipe.train.sft import loop, rejection
from r1pipe.train.sft.loop import (
    LMLoss,
    epochs_of,
    loss_sums,
    pack_demonstrations,
    read,
    steps_in,
    train,
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(content_dir() / "tokenizer")


TRACES = [
    Demonstration(
        Prompt(f"p{i}", "word", "en", f"What is {i} plus {i}?"),
        f"<think>\n{i}+{i}\n</think>\n\nIt is {2 * i}.",
    )
    for i in range(12)
]


def test_loss_is_of_response_tokens_alone(chat):
    model, (row,) = tiny_model(), pack_demonstrations(chat, TRACES[:1], 128)
    batch = collate([row], chat.pad_id)
    logprobs_TV = model(batch.tokens_BT)[0, :-1].log_softmax(-1)
    answer = [*chat.encode(TRACES[0].response), chat.eos_id]
    start = len(row.tokens) - len(answer)
    expected = -sum(logprobs_TV[start + i - 1, token].item() for i, token in enumerate(answer))
    loss, _ = loss_sums(model, batch, *read(model, batch, False), with_mtp=False)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_packing_changes_neither_loss_nor_gradient(chat):
    alone = [row for trace in TRACES for row in pack_demonstrations(chat, [trace], 128)]
    packed = pack_demonstrations(chat, TRACES, 128)
    assert len(packed) < len(alone)
    found = []
    for rows in (alone, packed):
        model = tiny_model()
        batch = collate(rows, chat.pad_id)
        loss, _ = loss_sums(model, batch, *read(model, batch, False), with_mtp=False)
        loss.backward()
        found.append((loss.item(), model.model.embed_tokens.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


def test_shares_of_ranks_and_micro_batches_make_the_mean_over_the_batch(chat):
    rows = pack_demonstrations(chat, TRACES, 64)[:5]
    model = DeepseekV3(replace(tiny_model().config, num_nextn_predict_layers=1))
    learned = sum(row.learned for row in rows)
    batch = collate(rows, chat.pad_id)
    hidden, balances = read(model, batch, with_balance=True)
    sums = loss_sums(model, batch, hidden, balances, with_mtp=True)
    mean, mtp = (part.item() / learned for part in sums)
    balance = balances[0].total().item() / (batch.segments_BT != 0).sum().item()

    class OfTwo:
        module, world_size, device = model, 2, torch.device("cpu")

        def __init__(self, rank):
            self.rank = rank

        def sum_over_ranks(self, values):
            return [2 * value for value in values]  # as if the other rank had the same

    shares = [LMLoss(OfTwo(rank), rows, 0.3, 0.01, chat.pad_id) for rank in (0, 1)]
    passes = [each.micro_losses(2) for each in shares]
    of_ranks = [sum(loss().item() for loss in of_rank) for of_rank in passes]
    assert sum(of_ranks) / 2 == pytest.approx(mean + 0.3 * mtp + 0.01 * balance, rel=1e-5)
    terms = [each.terms(*found) for each, *found in zip(shares, of_ranks, passes, strict=True)]
    for name, expected in {"loss": mean, "mtp_loss": mtp, "balance_loss": balance}.items():
        assert sum(each[f"train/{name}"] for each in terms) / 2 == pytest.approx(expected, rel=1e-5)


def test_loads_count_the_batchs_tokens_and_no_padding(chat):
    """Rows of unequal lengths in two micro-batches, with the empty row of a rank that has fewer."""
    rows = [*pack_demonstrations(chat, TRACES, 64)[:2], *pack_demonstrations(chat, TRACES[:1], 64), Packed()]
    tokens = [len(row.tokens) for row in rows]
    assert tokens[0] > tokens[2] > tokens[3] == 0
    model = DeepseekV3(replace(tiny_model().config, num_nextn_predict_layers=1))
    engine = Engine(model, OPTIM, ROUTER, engine_config(), total_steps=10)
    documents = sum(row.segments[-1] for row in rows if row.segments)
    for weights, mtp in (((0.0, 0.0), 0), ((0.3, 0.01), sum(tokens) - documents)):
        stats = engine.train_step(LMLoss(engine, rows, *weights, chat.pad_id).micro_losses(2))
        assert stats.loads_LE.sum(1).tolist() == [2 * sum(tokens), 2 * mtp]  # two experts a token


def test_traces_that_cannot_be_trained_on_are_named(chat):
    with pytest.raises(DataError, match="no worked solutions"):
        pack_demonstrations(chat, [], 128)
    with pytest.raises(DataError, match="sequence_length=8"):
        pack_demonstrations(chat, TRACES, 8)


def run_training(folder, chat, steps, stop=None):
    """Train on the traces; `stop` interrupts after so many steps, as a kill would."""
    losses = []
    with open_run(folder) as run:
        rows = pack_demonstrations(chat, TRACES * 3, 64)
        total = steps_in(len(rows), 4, epochs=2, max_steps=steps)
        engine = Engine(tiny_model(), run.stage.optim, run.stage.router, engine_config(), total)
        whole = run.log

        def interrupted(step, metrics):
            whole(step, metrics)
            losses.append(metrics["train/loss"])
            if step == stop:
                raise InterruptedError

        run.log = interrupted
        with suppress(InterruptedError):
            run.chat = chat
            train(run, engine, epochs_of(run, rows, 4), total)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, losses


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path, chat):
    config = tiny("cold_start", "stage.save_every=3", "stage.eval.every=0")
    whole, _ = run_training(write_run(tmp_path / "whole", config), chat, 8)
    cut = write_run(tmp_path / "cut", config)
    run_training(cut, chat, 8, stop=5)
    resumed, losses = run_training(cut, chat, 8)
    assert len(losses) == 5  # from step 3 on, where the last checkpoint was
    kept = ("step", "train/loss", "train/lr", "train/grad_norm", "router/max_vio")
    assert [{k: row[k] for k in kept} for row in resumed] == [{k: row[k] for k in kept} for row in whole]
    weights = [
        (tmp_path / name / "checkpoints" / "step-8" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    again, losses = run_training(cut, chat, 8)
    assert losses == [] and again == resumed  # a finished training trains no more


def test_the_loop_learns(tmp_path, chat):
    config = tiny("cold_start", "stage.eval.every=0", "stage.optim.lr=0.01", "stage.optim.warmup_steps=1")
    lines, _ = run_training(write_run(tmp_path / "run", config), chat, 10)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 1
    assert lines[0]["train/loss"] == pytest.approx(math.log(config.model.vocab_size), abs=0.5)
    assert all(row["train/tokens_per_s"] > 0 for row in lines)


def test_a_steps_batch_is_freed_before_the_next(tmp_path, chat, monkeypatch):
    """At once, not when Python next looks for cycles: a GPU would hold those of several steps."""
    made: list[weakref.ref[Batch]] = []
    alive: list[int] = []

    def watched(rows, pad_id):
        alive.append(sum(batch() is not None for batch in made))
        batch = collate(rows, pad_id)
        made.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(loop, "collate", watched)
    monkeypatch.setattr(Batch, "to", lambda batch, device: batch)  # no copy
    config = tiny("cold_start", "stage.eval.every=0")
    folder = write_run(tmp_path / "run", config)
    gc.disable()
    try:
        run_training(folder, chat, 3)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


class RightHalfTheTime:
    """A sampler that answers every other time with what the source itself would write."""

    def __init__(self, chat, answers):
        self.chat, self.answers, self.calls = chat, answers, 0

    def close(self):
        pass

    def generate(self, prompts, params, progress=None, ended=None, stop=None):
        self.calls += bool(prompts)  # ranks without a shard of their own call, too
        made = []
        for place, tokens in enumerate(prompts):
            for draw in range(params.n):
                number = params.first + place * params.stride
                text = self.answers[tuple(tokens)] if draw % 2 else f"I give up {number} of {params.seed}."
                made.append(Completion([*self.chat.encode(text), self.chat.eos_id], [], "stop"))
                ended(place, made[-1])
        return made


@pytest.fixture
def sampled(tmp_path, chat):
    config = tiny("rejection_sft", "stage.prompts=20", "stage.samples_per_prompt=2", "data.tasks=[word]")
    folder = write_run(tmp_path / "run", config)
    source = open_data(config.data, config.seed)
    demonstrations = source.demonstrations(30, 1, {}, True)
    answers = {tuple(chat.prompt_tokens(trace.prompt)): trace.response for trace in demonstrations}
    return folder, source, [trace.prompt for trace in demonstrations], RightHalfTheTime(chat, answers)


def test_rejection_sampling_keeps_shards_filters_and_tells_origins(sampled, chat, monkeypatch):
    folder, source, prompts, sampler = sampled
    monkeypatch.setattr(rejection, "SHARD_ROUNDS", 1)
    parent = ParentRef("grpo", "grpo-s0-1", "/nowhere", "abc")
    with open_run(folder) as run:
        run.chat, run.data, run._sampler = chat, source, sampler
        run.stage.sampling.max_num_seqs = 16
        ranks = Ranks(engine_config())
        shards = rejection.draw_samples(run, ranks, prompts)
        assert len(shards) == sampler.calls == 4
        shards[2].unlink()  # what a kill would have cost
        assert rejection.draw_samples(run, ranks, prompts) == shards
        assert sampler.calls == 5
        of_three = SimpleNamespace(rank=0, world_size=3, barrier=lambda: None, agree_max=int)
        assert rejection.draw_samples(run, of_three, prompts) == shards
        assert sampler.calls == 5, "what is there is kept, whatever the number of ranks"
        path = rejection.build_dataset(run, parent, shards, [prompts[0].question], 3)
        demonstrations, data_hash = rejection.read_dataset(path)
        alone = rejection.drawn_in_order(shards, 2)
        for shard in shards:
            shard.unlink()
        for rank in range(3):
            of_three = SimpleNamespace(rank=rank, world_size=3, barrier=lambda: None, agree_max=int)
            shared = rejection.draw_samples(run, of_three, prompts)
        assert len(shared) == 6 and rejection.drawn_in_order(shared, 2) == alone
        assert [sample.prompt for sample in alone] == [prompt for prompt in prompts for _ in range(2)]
    funnel = json.loads((folder / "data" / "funnel.json").read_text())
    told = "drawn, 3 prompts passed over as too long"
    assert funnel[0] == {"name": told, "kept": 60, "dropped": 0}
    assert funnel[1]["name"] == "correct" and funnel[1]["dropped"] == 30 and funnel[1]["examples"]
    reasoning = [trace for trace in demonstrations if trace.source == "sampled:grpo-s0-1"]
    assert 0 < len(reasoning) <= 29 and prompts[0].id not in {trace.prompt.id for trace in reasoning}
    assert len(demonstrations) - len(reasoning) == round(len(reasoning) / 3)
    assert all(trace.source for trace in demonstrations) and len(data_hash) == 64


def test_reasoning_and_general_prompts_are_sampled_with_streams_of_their_own(sampled, chat):
    folder, source, prompts, sampler = sampled
    seeds = []
    with open_run(folder) as run:
        run.chat, run.data, run._sampler = chat, source, sampler
        for name in (rejection.REASONING, rejection.GENERAL):
            shards = rejection.draw_samples(run, Ranks(engine_config()), prompts[:2], name)
            texts = [sample.completion.text for sample in rejection.drawn_in_order(shards, 2)]
            seeds += {text.split()[-1] for text in texts if text.startswith("I give up")}
    assert len(seeds) == 2 and seeds[0] != seeds[1]


def test_a_context_is_kept_from_the_draw_to_the_dataset(sampled, chat):
    folder, source, prompts, sampler = sampled
    before = (Message("system", "Be brief."), Message("user", "Hello."), Message("assistant", "Hi."))
    prompted = [replace(prompts[0], context=before), *prompts[1:3]]
    sampler.answers = {
        tuple(chat.prompt_tokens(new)): sampler.answers[tuple(chat.prompt_tokens(old))]
        for new, old in zip(prompted, prompts, strict=False)
    }
    with open_run(folder) as run:
        run.chat, run.data, run._sampler = chat, source, sampler
        shards = rejection.draw_samples(run, Ranks(engine_config()), prompted)
        drawn = rejection.drawn_in_order(shards, 2)
        path = rejection.build_dataset(run, ParentRef("grpo", "g", "/nowhere", "abc"), shards, [], 0)
    assert [sample.prompt for sample in drawn[::2]] == prompted
    kept = {trace.prompt.id: trace.prompt.context for trace in rejection.read_dataset(path)[0]}
    assert kept[prompted[0].id] == before and set(kept.values()) == {before, ()}


def test_when_nothing_is_kept_general_data_is_learned_alone_or_the_worst_filter_named(sampled, chat):
    folder, source, prompts, sampler = sampled
    sampler.answers = dict.fromkeys(sampler.answers, "No idea.")
    parent = ParentRef("grpo", "grpo-s0-1", "/nowhere", "abc")
    with pytest.raises(SystemExit), open_run(folder) as run:
        run.chat, run.data, run._sampler = chat, source, sampler
        shards = rejection.draw_samples(run, Ranks(engine_config()), prompts)
        path = rejection.build_dataset(run, parent, shards, [], 0)
        demonstrations, _ = rejection.read_dataset(path)
        assert len(demonstrations) == 7 and all(trace.source == "world" for trace in demonstrations)
        funnel = json.loads((folder / "data" / "funnel.json").read_text())
        assert funnel[-1]["name"] == rejection.GENERAL_ALONE
        path.unlink()
        run.stage.general_ratio = 0.0
        rejection.build_dataset(run, parent, shards, [], 0)
    assert "60 dropped by 'correct'" in (folder / "error.txt").read_text()


def test_what_the_evaluation_asks_is_known_to_the_filters(sampled, chat):
    folder, source, _, _ = sampled
    with open_run(folder) as run:
        run.chat, run.data = chat, source
        questions = rejection.evaluation_questions(run, context=384)
        config = run.stage.eval
    asked = {prompt.question for prompt in source.prompts(config.split, config.problems, HELD_OUT)}
    asked |= {prompt.question for prompt in source.prompts("dev", config.every_problems, HELD_OUT)}
    for split, count in ((config.split, config.harder), ("dev", min(config.harder, config.every_problems))):
        harder = {prompt.question for prompt in source.harder_prompts(split, count, HELD_OUT)}
        assert len(harder) == count > 0 and not harder & asked
        asked |= harder
    assert set(questions) == asked
