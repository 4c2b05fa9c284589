"""`r1pipe doctor`: a healthy stage passes, and each check finds the fault that is planted for it."""

import copy
import json
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import House
from jobs import on_two_ranks
from tiny_runs import load_stage, tiny_config, tiny_run
from tokenizers import Tokenizer

from r1pipe import rewards
from r1pipe.chat.template import END_THINK, THINK, TOKENIZER_FILES, Chat, parse
from r1pipe.cli import doctor as examine
from r1pipe.config import ParentRef, read_config
from r1pipe.core.paths import RunFolder, content_dir
from r1pipe.core.types import Demonstration, Prompt, Score, Status
from r1pipe.data.world.content import split_of
from r1pipe.doctor import CHECKS, Context, policy, resources, reward_models, run_check
from r1pipe.doctor import examine as run_all
from r1pipe.doctor.context import Band, limits
from r1pipe.doctor.data import near_copies
from r1pipe.model import DeepseekV3, save_pretrained
from r1pipe.plan import footprint
from r1pipe.rewards import models
from r1pipe.rewards.models import RewardModel, save_reward_model
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.runs.reward_model_quality import FORCE
from r1pipe.train.run import Run

GRPO = ["stage=grpo", "stage.sampling.max_tokens=24"]
Make = Callable[..., Context]


@pytest.fixture
def context(tmp_path: Path) -> Make:
    """A context of a tiny model with random weights, and of small draws."""

    def make(*overrides: str, weights: ParentRef | None = None, **reads: ParentRef) -> Context:
        folder = RunFolder(tiny_run(tmp_path / "run", *overrides, weights=weights, **reads))
        config = read_config(folder.config)
        small = replace(limits(), rows=40, judged=4, probe_prompts=2, probe_group=2)
        return Context(Run(folder, config, config.stage), small)

    return make


def found(context: Context, name: str) -> Finding:
    finding = run_check(context, name)
    assert finding.name == name and bool(finding.remedy) == (finding.status != PASS)
    return finding


def by_name(context: Context) -> dict[str, Finding]:
    return {finding.name: finding for finding in run_all(context)}


def test_a_band_grades_in_both_directions() -> None:
    high, low = Band(warn=0.1, fail=0.5), Band(warn=0.5, fail=0.1)
    assert [high.grade(x) for x in (0.1, 0.3, 0.6)] == [PASS, WARN, FAIL]
    assert [low.grade(x) for x in (0.5, 0.3, 0.05)] == [PASS, WARN, FAIL]
    assert [low.grade(float("nan")), high.grade(float("nan"))] == [FAIL, FAIL]


def test_a_stage_that_only_lacks_training_passes_all_that_is_not_of_the_policy(context: Make) -> None:
    verdicts = {name: finding.status for name, finding in by_name(context(*GRPO)).items()}
    assert list(verdicts) == list(CHECKS)
    untrained = {"truncation": FAIL, "variance": WARN, "opens <think>": WARN}
    assert verdicts == dict.fromkeys(CHECKS, PASS) | untrained


@pytest.mark.parametrize("stage", ["cold_start", "rejection_sft", "pretrain", "base", "reward_model"])
def test_other_stages_have_fewer_checks_and_pass_them(context: Make, stage: str) -> None:
    seen = by_name(context(f"stage={stage}"))
    assert not [name for name in seen if CHECKS[name].kinds == CHECKS["variance"].kinds]
    assert {finding.status for finding in seen.values()} == {PASS}, seen


# --- data


def rows_file(path: Path, **changed: str) -> Path:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is\n#### {2 * i}"} for i in range(60)]
    rows[7] |= changed
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_without_its_gold_answer_fails_once_and_holds_up_the_rest(
    context: Make, tmp_path: Path
) -> None:
    path = rows_file(tmp_path / "rows.jsonl", answer="It is fourteen")
    seen = by_name(context(*GRPO, "data=gsm8k", f"data.path={path}", "data.tasks=[]"))
    assert seen["data"].status == FAIL and "rows.jsonl line 8" in seen["data"].remedy
    assert (seen["gold answers"].status, seen["gold answers"].value) == (WARN, "not measured")
    assert seen["gold answers"].remedy == "fix first: data" and seen["disk"].status == PASS


def test_a_missing_column_is_told(context: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "What is 1 + 1?", "answer": "#### 2"}\n')
    data = by_name(context(*GRPO, "data=gsm8k", f"data.path={path}", "data.tasks=[]"))["data"]
    assert data.status == FAIL and "question" in data.remedy and "query" in data.remedy


def test_rows_that_are_set_aside_are_told(context: Make, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", answer="It is fourteen")
    words = ("data=gsm8k", f"data.path={path}", "data.bad_rows=set_aside", "data.max_bad_rows=0.1")
    told = found(context(*GRPO, *words), "data")
    assert told.status == WARN and "1 of 60 rows of" in told.value and "line 8" in told.value
    assert re.search(r"data=gsm8k: 40 of \d+ rows to train on, \d+ of \d+ rows to evaluate on", told.value)


def test_a_gold_answer_that_nothing_can_match(context: Make) -> None:
    examined = context(*GRPO)
    examined.prompts = [*examined.prompts, Prompt("word-0", "word", "en", "How many?", "?!")]
    gold = found(examined, "gold answers")
    assert gold.status == FAIL and "word-0" in gold.remedy


# long enough to be told apart, and each with words of its own
PROBLEM = "{} had {} pears and {} of them were bad, so how many good {} pears were left for {} to sell?"


Rows = list[dict[str, str]]


def learned(rows: Rows) -> Rows:
    """Those that are trained on: the hash of the others makes them development problems."""
    return [row for row in rows if split_of(" ".join(row["question"].lower().split())) != "dev"]


def problems(first: int, count: int) -> Rows:
    rows = [
        {"question": PROBLEM.format(f"Ann{i}", 2 * i, i, f"kind{i}", f"Bob{i}"), "answer": f"So\n#### {i}"}
        for i in range(first, first + 2 * count)
    ]
    return learned(rows)[:count]


def in_files(context: Make, folder: Path, *words: str, extra: Rows) -> Context:
    """Of 400 rows to train on, with `extra` among them, and 100 to evaluate on; only 40 are drawn."""
    folder.mkdir(exist_ok=True)
    rows = problems(1, 400)
    for name, found in (("train", [*rows[:200], *extra, *rows[200:]]), ("test", problems(1000, 100))):
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"gsm8k_{name}.jsonl").write_text(lines, encoding="utf-8")
    return context(*(words or GRPO), "data=gsm8k", f"data.path={folder}")


@pytest.mark.parametrize("words", [GRPO, ["stage=cold_start"]])
def test_rows_of_a_file_that_stand_there_twice_are_counted_before_they_are_left_out(
    context: Make, tmp_path: Path, words: list[str]
) -> None:
    again = learned([row | {"question": f"  {row['question']} !"} for row in problems(1, 9)])[:5]
    examined = in_files(context, tmp_path / "data", *words, extra=[*problems(1, 100), *again])
    found_twice = found(examined, "duplicates")
    assert (found_twice.status, found_twice.value) == (FAIL, "105 of 505 rows (20.8%)")
    assert "the first: gsm8k_train.jsonl:201" in found_twice.remedy


def test_a_solution_of_its_own_is_no_duplicate_where_solutions_are_learned(
    context: Make, tmp_path: Path
) -> None:
    otherwise = [row | {"answer": f"Otherwise: {row['answer']}"} for row in problems(1, 20)]
    tuned = in_files(context, tmp_path / "data", "stage=cold_start", extra=otherwise)
    assert found(tuned, "duplicates").value == "0 of 420 rows (0.0%)"
    shutil.rmtree(tmp_path / "run")
    asked = in_files(context, tmp_path / "data", extra=otherwise)
    assert found(asked, "duplicates").status == WARN


def test_every_near_copy_of_an_evaluation_question_in_a_file_is_found(context: Make, tmp_path: Path) -> None:
    assert found(in_files(context, tmp_path / "data", extra=[]), "overlap").status == PASS
    near = [row | {"question": row["question"].replace("Ann", "Tom")} for row in problems(1000, 30)]
    shutil.rmtree(tmp_path / "run")
    copied = found(in_files(context, tmp_path / "data", extra=learned(near)[:20]), "overlap")
    assert copied.status == FAIL
    trained_on, nearly = "0 of 100 evaluation questions are trained on (420 rows)", "20 more nearly"
    assert copied.value == f"{trained_on}, {nearly}, in 80% of their words"
    assert "the first: gsm8k_train.jsonl:201, evaluated as 'Ann1000 had 2000 pears" in copied.remedy


def test_an_evaluation_question_that_is_trained_on_fails_whatever_its_signs(
    context: Make, tmp_path: Path
) -> None:
    whole = [row | {"question": row["question"].replace("?", " ?!")} for row in problems(1000, 9)]
    copied = found(in_files(context, tmp_path / "data", extra=learned(whole)[:1]), "overlap")
    assert copied.status == FAIL and copied.value.startswith("1 of 100 evaluation questions are trained on")


def test_common_phrasing_tells_no_copy() -> None:
    begins = "Using the numbers below , write one equation that makes the target , each number once : "
    asked = [f"{begins} {i} {i + 1} {i + 2} make {3 * i}" for i in range(100, 140)]
    rows = [Demonstration(Prompt(str(i), "", "en", f"{begins} {i} {i} {i} make {i}"), "") for i in range(200)]
    assert near_copies(asked, rows, limits()) == {}
    rows.append(Demonstration(Prompt("", "", "en", f"Hello . {asked[7]} please"), "", source="here"))
    assert {number: row.source for number, row in near_copies(asked, rows, limits()).items()} == {7: "here"}


def test_a_bound_on_rows_is_told_and_keeps_all_copies_of_a_question(context: Make, tmp_path: Path) -> None:
    examined = in_files(context, tmp_path / "data", extra=problems(1, 400))
    examined.limits.texts = 200
    bounded = found(examined, "duplicates")
    assert "(50.0%); only one question in 4 of 800 is checked: texts in conf/doctor" in bounded.value
    assert 100 < int(bounded.value.split(" of ")[1].split()[0]) < 300
    assert "one question in 4 of 800" in found(examined, "overlap").value


def test_what_is_made_by_templates_is_compared_as_drawn_and_only_whole(context: Make) -> None:
    examined = context(*GRPO)
    assert found(examined, "duplicates").value == "0 of 40 rows drawn (0.0%)"
    assert found(examined, "overlap").value.endswith("are trained on (40 rows drawn)")
    del examined.training_rows
    examined.prompts = [*examined.prompts, examined.held_out[0]]
    assert found(examined, "overlap").status == FAIL


# --- rewards and template


def chat_with(template: str = "", special: tuple[str, ...] = ()) -> Chat:
    folder = content_dir() / "tokenizer"
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in special
    own = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return Chat(Tokenizer.from_str(json.dumps(content)), template or own)


def test_think_tags_that_are_special_tokens_are_rewarded_all_the_same(context: Make) -> None:
    examined = context(*GRPO)
    examined.chat, plain = chat_with(special=(THINK, END_THINK)), examined.chat
    assert found(examined, "rewards").status == PASS
    text = "<think>\n两 + 2 = 4\n</think>\n\n4"
    tokens = [plain.eos_id, *plain.encode(text), plain.eos_id]
    assert examined.chat.decode(tokens) == plain.decode(tokens) == text


def test_a_reward_that_pays_for_anything(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.BASE_REWARDS, "format", lambda prompt, completion: Score(1.0))
    paid = found(context(*GRPO), "rewards")
    assert paid.status == FAIL and "useless ones up to 1.00" in paid.value


def test_a_checker_that_takes_every_answer(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stated(prompt: Prompt, completion: Any) -> Score:
        return Score(float(completion.text.startswith(THINK)))

    monkeypatch.setattr(rewards, "accuracy_reward", stated)
    lenient = found(context(*GRPO), "rewards")
    assert lenient.status == FAIL and "cannot tell right from wrong" in lenient.remedy


@pytest.mark.parametrize(
    "words",
    [
        "stage=zero",
        "stage=grpo stage.kl_in=reward",
        "stage=grpo stage.algorithm=ppo",
        "stage=grpo +stage.rewards.weights.cosine=1 +stage.rewards.weights.repetition=0.5",
    ],
)
def test_rewards_that_are_not_on_what_is_said_are_not_tried(context: Make, words: str) -> None:
    assert found(context(*words.split()), "rewards").status == PASS


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("len(completion.text) > 75", PASS, "mine gives 0.00 to 1.00 in"),
        ("None", WARN, "mine has no rule for any of these prompts"),
        ("1 / 0", FAIL, "mine has no verdict: ZeroDivisionError"),
        ("nowhere", FAIL, "mine has no verdict: NameError"),
    ],
)
def test_a_custom_reward_is_tried(context: Make, tmp_path: Path, code: str, status: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(prompt, completion): return {code}")
    examined = context(*GRPO, f"stage.rewards.plugins=[{path}]", "stage.rewards.weights={mine: 1.0}")
    finding = found(examined, "custom rewards")
    examined.custom.close()
    assert finding.status == status and told in f"{finding.value} {finding.remedy}"


def test_gold_answers_alone_make_known_good_responses(context: Make, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl")
    examined = context(*GRPO, "data=gsm8k", f"data.path={path}", "data.tasks=[]")
    examined.solved = []
    assert found(examined, "rewards").status == PASS


def test_a_template_that_opens_think_itself(context: Make) -> None:
    examined = context(*GRPO)
    own = examined.chat.source
    examined.chat = chat_with(
        template=own.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
    )
    assert examined.chat.source != own
    opened = found(examined, "opens <think>")
    assert opened.status == PASS and opened.value.startswith("the template does"), "rewards read it, too"
    assert found(examined, "chat template").status == PASS
    always_dropped = examined.chat.source.replace("text(m) if loop.last else ", "")
    assert always_dropped != examined.chat.source
    examined.chat = chat_with(template=always_dropped)
    dropped = found(examined, "chat template")
    assert dropped.status == WARN and "drops the thought" in dropped.remedy


CLOSED = "{% if enable_thinking is not defined %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


@pytest.mark.parametrize(
    ("old", "new", "status", "told"),
    [
        ("{{ ns.system }}", "", WARN, "leaves out a message of system"),
        ("in ['system', 'developer']", "in ['nobody']", WARN, "no place for messages of system"),
        ("<｜User｜>{{ text(m) }}", "<｜User｜>", FAIL, "leaves out what users or assistants say"),
        ("text(m) if loop.last else ", "", FAIL, "is not what it follows"),
        ("<｜Assistant｜>{% endif %}", "<｜Assistant｜>So: {% endif %}", FAIL, "is not what it follows"),
        ("<｜Assistant｜>{% endif %}", f"<｜Assistant｜>{CLOSED}", FAIL, "template opens and closes <think>"),
        ("{{ eos_token }}", "", FAIL, "does not end an answer with"),
        ("else text(m).split('</think>')[-1].strip()", "else text(m)", PASS, "earlier reasoning kept"),
    ],
)
def test_a_template_of_other_weights_is_tried(
    context: Make, old: str, new: str, status: str, told: str
) -> None:
    examined = context(*GRPO)
    assert found(examined, "chat template").value == (
        "system messages kept, model opens <think>, earlier reasoning left out"
    )
    assert old in examined.chat.source
    examined.chat = chat_with(template=examined.chat.source.replace(old, new))
    seen = found(examined, "chat template")
    assert seen.status == status and told in f"{seen.value} {seen.remedy}"


def test_a_system_prompt_is_told_and_must_leave_room(context: Make, tmp_path: Path) -> None:
    examined = context(*GRPO, "chat.system=Be brief.")
    assert found(examined, "chat template").value.endswith("system prompt 'Be brief.'")
    shutil.rmtree(tmp_path / "run")
    crowded = by_name(context(*GRPO, f"chat.system={'7 ' * 250}7"))["chat template"]
    assert crowded.status == FAIL and "leaves no room for a question" in crowded.remedy


def test_an_end_that_cannot_be_learned(context: Make) -> None:
    examined = context(*GRPO)
    examined.chat.pad_id = examined.chat.eos_id
    assert "also the padding" in found(examined, "end of sequence").remedy
    del examined.chat
    examined.config = replace(examined.config, model=replace(examined.config.model, vocab_size=1100))
    assert "raise model.vocab_size" in found(examined, "end of sequence").remedy


def test_an_end_that_the_weights_do_not_stop_at(context: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_pretrained(DeepseekV3(tiny_config(*GRPO).model, torch.Generator().manual_seed(0)), base)
    for name in TOKENIZER_FILES:
        shutil.copyfile(content_dir() / "tokenizer" / name, base / name)
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    checkpoints.write_manifest(base)
    seen = found(context(*GRPO, weights=lineage.checkpoint_of_folder(base)), "end of sequence")
    assert seen.status == FAIL and "ends at (5,)" in seen.remedy


def test_prompts_and_examples_that_do_not_fit(context: Make) -> None:
    tight = found(context(*GRPO, "model.max_position_embeddings=32"), "lengths")
    assert tight.status == FAIL and "are over 8 tokens" in tight.value


def test_examples_that_do_not_fit(context: Make) -> None:
    tight = found(context("stage=cold_start", "stage.sequence_length=20"), "lengths")
    assert tight.status == FAIL
    assert tight.remedy == "raise stage.sequence_length, up to model.max_position_embeddings=512"


# --- the policy


def test_completions_that_are_cut_off(context: Make) -> None:
    cut = found(context(*GRPO), "truncation")
    assert (cut.status, cut.value) == (FAIL, "100% of 4 completions are cut off at 24 tokens")


def test_a_cut_of_the_probes_own_only_warns(context: Make) -> None:
    examined = context("stage=grpo", "stage.sampling.max_tokens=100")
    examined.limits.probe_tokens = 24
    cut = found(examined, "truncation")
    assert cut.status == WARN and "the stage allows 100" in cut.remedy


def probed(context: Make, *accuracies: float, status: Status = Status.SCORED) -> Finding:
    """What is said of a probe whose groups' completions earn these accuracies."""
    examined = context(*GRPO)
    for group in examined.probe.groups:
        scores = [Score(accuracy, status, "the sandbox is gone") for accuracy in accuracies]
        group.scores = [{"accuracy": score} for score in scores]
        group.rewards = [s.value if s.status is Status.SCORED else math.nan for s in scores]
    return found(examined, "variance")


def test_groups_that_teach(context: Make) -> None:
    assert probed(context, 0.0, 1.0).status == PASS


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_groups_without_variance(context: Make, accuracy: float) -> None:
    same = probed(context, accuracy, accuracy)
    assert same.status == FAIL and "0% of 2 groups differ" in same.value


def test_ppo_needs_no_groups(context: Make) -> None:
    words = ("stage.algorithm=ppo", "stage.group_size=1", "stage.minibatches=1")
    examined = context(*GRPO, *words)
    one, other = examined.probe.groups
    for group, accuracy in ((one, 1.0), (other, 0.0)):
        group.scores, group.rewards = [{"accuracy": Score(accuracy)}], [accuracy]
    apart = found(examined, "variance")
    assert apart.status == PASS and apart.value.startswith("2 completions: rewards 0.00 to 1.00")
    one.rewards = [0.0]
    alike = found(examined, "variance")
    assert alike.status == FAIL and "group_size" not in alike.remedy


def test_a_probe_that_no_verifier_could_score(context: Make) -> None:
    lost = probed(context, 0.0, 0.0, status=Status.INFRASTRUCTURE_FAILED)
    assert lost.status == FAIL and "the sandbox is gone" in lost.remedy


def test_a_sampler_whose_probabilities_are_off(context: Make) -> None:
    examined = context(*GRPO)
    assert found(examined, "logprobs").status == PASS
    del examined.trained
    for rollout in examined.probe.rollouts:
        rollout.completion.logprobs = [logprob + 0.1 for logprob in rollout.completion.logprobs]
    off = found(examined, "logprobs")
    assert off.status == FAIL and "nats a token apart" in off.value


def test_a_sampler_that_keeps_the_old_weights(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = context(*GRPO)
    stale = copy.deepcopy(examined.engine.module)

    @contextmanager
    def gathered(engine: Any) -> Iterator[Any]:
        yield stale

    monkeypatch.setattr(type(examined.engine), "gathered", gathered)
    assert found(examined, "logprobs").status == PASS
    assert found(examined, "after a weight sync").status == FAIL


def test_a_sampler_that_routes_otherwise(context: Make) -> None:
    examined = context(*GRPO)
    for rollout in examined.probe.rollouts:
        experts = rollout.completion.experts
        rollout.completion.experts = (experts + 1) % examined.config.model.n_routed_experts
    apart = found(examined, "routing")
    assert apart.status == FAIL and "importance_cap" in apart.remedy


def test_a_step_too_small_to_show_is_told(context: Make) -> None:
    examined = context(*GRPO, "stage.optim.lr=1e-12", "stage.optim.min_lr=0")
    examined.limits.probe_lr = 1e-12
    assert found(examined, "after a weight sync").status == WARN


def test_a_checkpoint_that_is_not_what_was_saved(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(model: DeepseekV3, folder: Path) -> None:
        changed = copy.deepcopy(model)
        changed.lm_head.weight.data[0, 0] += 1
        save_pretrained(changed, folder)

    examined = context(*GRPO)
    assert found(examined, "save and load").status == PASS
    monkeypatch.setattr(policy, "save_pretrained", lossy)
    lost = found(examined, "save and load")
    assert lost.status == FAIL and "lm_head.weight" in lost.remedy


# --- resources


def test_memory_counts_the_logits_and_what_is_kept(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = context(*GRPO)
    config = examined.config
    need = footprint.needed(config, 100)
    wide = replace(config, model=replace(config.model, vocab_size=2 * config.model.vocab_size))
    assert footprint.needed(wide, 100).logits == 2 * need.logits > 0
    bound = replace(config, stage=replace(config.stage, kl_coef=0.0))
    assert need.states - footprint.needed(bound, 100).states == 4 * footprint.parameters(config.model)
    deep = replace(config, model=replace(config.model, num_hidden_layers=12))  # one layer is held whole
    saving = replace(deep, engine=replace(config.engine, recompute=True))
    assert footprint.needed(saving, 100).activations < footprint.needed(deep, 100).activations / 2
    monkeypatch.setattr(resources, "available", lambda device, ranks: need.peak / 2)
    short = found(examined, "memory")
    assert (
        short.status == FAIL
        and "logits" in short.value
        and "stage.max_tokens_per_micro_batch" in short.remedy
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(context: Make) -> None:
    seen = by_name(context(*GRPO, "engine.accelerator=cuda"))
    assert seen["device"].status == FAIL and "torch sees no GPU" in seen["device"].remedy
    assert {seen[name].remedy for name in ("truncation", "memory")} == {"fix first: device"}


def test_a_full_disk(context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    full = found(context(*GRPO), "disk")
    assert full.status == FAIL and "stage.keep" in full.remedy


# --- reward models


def reward_models_in(folder: Path, *kinds: str, head: float = 0.0) -> Path:
    """A finished reward_model checkpoint whose models have learned nothing; without a head all is alike."""
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        model = RewardModel(DeepseekV3(tiny_config(*GRPO).model, torch.Generator().manual_seed(0)))
        model.score.weight.data += head
        save_reward_model(model, folder / kind)
    for name in TOKENIZER_FILES:
        shutil.copyfile(content_dir() / "tokenizer" / name, folder / name)
    checkpoints.write_manifest(folder)
    return folder


UNFORCED = "stage.preference.force=false"  # the smoke recipe forces


@pytest.fixture
def untaught(tmp_path: Path) -> Path:
    """A finished reward_model checkpoint whose helpfulness model scores all alike."""
    return reward_models_in(tmp_path / "reward_model", "helpful")


def test_a_reward_model_that_has_learned_nothing(context: Make, untaught: Path) -> None:
    parent = lineage.checkpoint_of_folder(untaught)
    poor = found(context("stage=all_scenario", UNFORCED, reward_model=parent), "reward models")
    assert poor.status == FAIL and "helpful: 50.0% of" in poor.value and "harmless: none" in poor.value
    shutil.rmtree(untaught.parent / "run")
    missing = found(context("stage=all_scenario", FORCE, reward_model=parent), "reward models")
    assert missing.status == FAIL, "the stage will not start"
    assert "in order is 0.5, below stage.preference.min_accuracy=0.6" in poor.remedy


def test_a_weak_reward_model_that_is_forced_or_near_its_bound_is_a_warning(
    context: Make, untaught: Path
) -> None:
    parent = lineage.checkpoint_of_folder(untaught)
    without = "stage.preference.harmless_weight=0"
    forced = found(context("stage=all_scenario", FORCE, without, reward_model=parent), "reward models")
    assert forced.status == WARN and "below stage.preference.min_accuracy" in forced.remedy
    shutil.rmtree(untaught.parent / "run")
    words = ("stage=all_scenario", UNFORCED, "stage.preference.min_accuracy=0.48")
    near = found(context(*words, without, reward_model=parent), "reward models")
    assert near.status == WARN and "near its bound" in near.remedy and "harmless" not in near.value


def test_a_reward_model_that_pays_for_words(context: Make, untaught: Path) -> None:
    examined = context("stage=all_scenario", UNFORCED, reward_model=lineage.checkpoint_of_folder(untaught))
    scored = reward_models.measure_quality

    def wordy(*known: Any) -> Any:
        measured, scores = scored(*known)
        return measured | {"accuracy": 0.9, "length_correlation": 0.95}, scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_models, "measure_quality", wordy)
        paid = found(examined, "reward models")
    assert paid.status == FAIL and "length r +0.95" in paid.value
    assert "max_length_correlation=0.7" in paid.remedy


def test_a_reward_model_whose_file_has_changed(context: Make, untaught: Path) -> None:
    parent = lineage.checkpoint_of_folder(untaught)
    weights = untaught / "helpful" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    seen = by_name(context("stage=all_scenario", reward_model=parent))["reward models"]
    assert seen.status == FAIL and "is not what was saved" in seen.remedy


# --- general prompts


def test_a_stage_of_rules_alone_asks_nothing_of_general_prompts(context: Make) -> None:
    examined = context(*GRPO)
    names = ("general prompts", "what judges read", "refusals")
    assert {found(examined, name).value for name in names} == {
        "not needed: this stage has rule-based rewards only"
    }


@pytest.fixture
def scenario(context: Make, tmp_path: Path) -> Context:
    """All-scenario training with reward models of both kinds, and a probe of general prompts too."""
    folder = reward_models_in(tmp_path / "reward_model", "helpful", "harmless", head=0.5)
    words = ["stage=all_scenario", "stage.sampling.max_tokens=24"]
    return context(*words, reward_model=lineage.checkpoint_of_folder(folder))


def test_general_completions_that_judges_cannot_read(scenario: Context) -> None:
    cut = found(scenario, "general prompts")
    assert (
        cut.status == FAIL
        and "1 general prompts of 2 drawn; 0% of 4 completions could be scored" in cut.value
    )
    assert "stage.sampling.max_tokens" in cut.remedy
    assert "2 groups differ" not in found(scenario, "variance").value, "rules alone judge the policy there"
    assert "4 completions" in found(scenario, "truncation").value, "of both kinds"


def judged(scenario: Context, *rewards: float, kind: str = "helpful") -> Finding:
    """What is said where the general completions earned these rewards from this kind of judge."""
    for group in scenario.probe.groups:
        group.scores = [{kind: Score(reward, detail="score 1")} for reward in rewards]
        group.rewards = list(rewards)
    return found(scenario, "general prompts")


def test_general_prompts_that_teach_or_do_not(scenario: Context) -> None:
    assert judged(scenario, 0.2, 0.9).status == PASS
    same = judged(scenario, 0.5, 0.5)
    assert same.status == WARN and "0% of groups differ" in same.value
    unjudged = judged(scenario, 0.2, 0.9, kind="format")
    assert unjudged.status == FAIL and "no reward model scores them" in unjudged.remedy
    scenario.probe.groups = [group for group in scenario.probe.groups if rewards.is_verifiable(group.prompt)]
    assert "general_share" in found(scenario, "general prompts").remedy


def test_general_prompts_that_do_not_fit(scenario: Context) -> None:
    assert found(scenario, "lengths").status == PASS
    scenario.general = [Prompt("w", "writing", "en", "word " * 2000)] * 20
    assert found(scenario, "lengths").status == WARN


@pytest.mark.parametrize(
    ("whole", "remedy"), [(True, "must read only the summary"), (False, "must read the whole response")]
)
def test_judges_that_read_too_much_or_too_little(
    scenario: Context, monkeypatch: pytest.MonkeyPatch, whole: bool, remedy: str
) -> None:
    assert found(scenario, "what judges read").status == PASS

    def same_for_both(kind: str, chat: Chat, prompt: Prompt, response: str) -> list[int]:
        return chat.example(prompt, response if whole else parse(response).summary).tokens

    monkeypatch.setattr(models, "scored_tokens", same_for_both)
    assert remedy in found(scenario, "what judges read").remedy


@pytest.mark.parametrize(
    ("worth", "status", "remedy"),
    [
        (lambda truth: truth.helpful, PASS, ""),
        (lambda truth: float(truth.refused), FAIL, "needless refusals would be learned"),
        (lambda truth: float(not truth.refused), FAIL, "unsafe answers would be learned"),
    ],
)
def test_what_refusals_earn(
    scenario: Context, worth: Callable[[Any], float], status: str, remedy: str
) -> None:
    scenario.limits.rows = 400
    truth = scenario.data.truth
    assert truth is not None
    scenario.reward_models = {
        "helpful": lambda prompts, given: [
            Score(worth(truth(prompt, one.text))) for prompt, one in zip(prompts, given, strict=True)
        ]
    }
    seen = found(scenario, "refusals")
    assert seen.status == status and remedy in seen.remedy


# --- several ranks


def test_two_ranks_probe_together_and_the_worst_of_them_counts(tmp_path: Path) -> None:
    seen = on_two_ranks("two_ranks_doctor.py", tmp_path)
    healthy = {row["name"]: row for row in seen["healthy"]}
    assert list(healthy) == list(CHECKS) and seen["groups"] == 4
    failed = {name for name, row in healthy.items() if row["status"] == FAIL}
    assert failed == {"truncation"}, healthy
    assert "2 of 2 ranks" in healthy["device"]["value"]
    logprobs, saved = seen["faults"]
    assert logprobs["status"] == FAIL and float(logprobs["value"].split()[0]) > 0.2
    assert saved["status"] == FAIL and "lm_head.weight" in saved["remedy"]


# --- the command


SCRIPT = """import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
if json.loads((folder / "config.json").read_text())["seed"] == 7:
    (folder / "error.txt").write_text("this cannot be\\n")
    sys.exit(2)
assert json.loads((folder / "config.json").read_text())["seed"] != 8
status = "fail" if json.loads((folder / "config.json").read_text())["seed"] else "pass"
row = {"name": "data", "status": status, "value": "[bold]none", "remedy": "add some"}
(folder / "findings.json").write_text(json.dumps([row]))
print("noise of a library")
"""


@pytest.fixture
def quick(house: House, tmp_path: Path) -> House:
    (tmp_path / "stages" / "doctor.py").write_text(SCRIPT)
    return house


WORDS = ["doctor", "stage=grpo", "parent=pretrain"]


def test_the_table_and_the_exit_code(quick: House, capsys: pytest.CaptureFixture) -> None:
    assert quick.call(*WORDS) == 0
    out = capsys.readouterr().out
    assert "[bold]none" in out and "add some" in out and "grpo: 5 pass, 0 warn, 0 fail" in out
    assert quick.call(*WORDS, "seed=1") == 1
    assert quick.call(*WORDS, "seed=1", "engine.ranks=1") == 1, "without the launcher"
    assert not quick.runs(), "it leaves no run behind"


def test_json_is_all_that_is_printed(quick: House, capsys: pytest.CaptureFixture) -> None:
    assert quick.call(*WORDS, "seed=1", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["stage"], told["failed"]) == ("grpo", True)
    names = ["data", "launcher", "tracker", "memory, at most", "disk, at most"]
    assert [row["name"] for row in told["checks"]] == names


def test_a_script_that_cannot_begin_is_one_line(quick: House, capsys: pytest.CaptureFixture) -> None:
    assert quick.call(*WORDS, "seed=7") == 2
    assert capsys.readouterr().err == "this cannot be\n"


def test_a_script_that_breaks_leaves_its_log(
    quick: House, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine.tempfile, "tempdir", str(tmp_path))
    assert quick.call(*WORDS, "seed=8") == 1
    told = capsys.readouterr().err
    assert "AssertionError" in told and Path(told.split("its whole log: ")[1].strip()).exists()
    assert quick.call(*WORDS, "seed=7") == 2
    assert len(list(tmp_path.glob("r1pipe-doctor-*"))) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["doctor"], "which stage?"),
        (["doctor", "stage=grop"], "did you mean grpo?"),
        (["doctor", "stage=grpo", "parent=nowhere"], "no checkpoint nowhere"),
        (["doctor", "stage=grpo", "parent=pretrain", "model=small"], "give model=laptop"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_code_2(
    quick: House, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    assert quick.call(*words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_tracker_that_does_not_answer() -> None:
    away = examine.check_tracker(tiny_config(*GRPO, "tracking.uri=http://127.0.0.1:9"))
    assert away.status == FAIL and "no MLflow server" in away.remedy
    assert examine.check_tracker(tiny_config(*GRPO)).status == PASS


def test_a_launcher_without_its_hostfile() -> None:
    words = ["engine.hostfile=/nowhere/hosts", "engine.launcher=pdsh"]
    lost = examine.check_launcher(tiny_config(*GRPO, *words))
    assert lost.status == FAIL and "does not exist" in lost.remedy


def test_the_script_writes_its_findings(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", "stage=cold_start")
    load_stage("doctor").main(str(folder))
    rows = json.loads((folder / "findings.json").read_text())
    assert {row["name"] for row in rows} >= {"data", "rewards", "save and load", "memory"}
