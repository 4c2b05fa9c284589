"""lm-evaluation-harness on our checkpoints: the numbers of its own model `hf` on an export of the weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_models import write_model
from jinja2.exceptions import SecurityError
from tiny_runs import load_stage

from r1pipe.config import ParentRef, to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.script_options import ExportOptions
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.paths import content_dir
from r1pipe.runs.checkpoints import manifest_hash
from r1pipe.runs.files import write_json
from r1pipe.runs.harness_tasks import check_tasks

if not os.environ.get("CI"):
    pytest.importorskip("lm_eval", reason="no lm-evaluation-harness; pip install 'r1pipe[lm-eval]'")

BASE = content_dir() / "base"
CHOICES = {
    "task": "which_sum",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
SUMS = {
    "task": "say_sum",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{options[answer]}}",
    "generation_kwargs": {"until": ["\n\n", "7"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
TEXTS = {
    "task": "how_likely",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ROWS = [
    {
        "question": f"Use {a}, {b} and {a * b} to make {a + b}." + " Take your time." * (a % 3),
        "options": [str(a + b), f"{a} * {b}", "none of these at all"],
        "answer": b % 2,
    }
    for a, b in [(3, 5), (4, 9), (2, 8), (11, 6), (7, 3), (5, 5)]
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on one file; no hub."""
    folder = tmp_path_factory.mktemp("tasks")
    # longer than the model reads; not periodic, as lm_eval's `hf` takes one window for another that equals it
    long = " ".join(str(number) for number in range(700))
    rows = [*ROWS, {"question": long, "options": ["1", "2", "3"], "answer": 0}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (CHOICES, SUMS, TEXTS):
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**task, **source}))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "base"
    load_stage("export").main(ExportOptions(BASE, folder, "float32", 5.0))
    return folder


def evaluated(tasks: Path, cache: Path, model: str, names: list[str], **more: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from r1pipe.lm_eval.adapter import register

    register()
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(cache)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    kind, _, args = model.partition(":")
    found = simple_evaluate(
        kind, args, tasks=names, task_manager=manager, device="cpu", batch_size=4, bootstrap_iters=0, **more
    )
    assert found is not None
    return found


def compare(tasks: Path, cache: Path, ours: Path, theirs: Path, **more: Any) -> None:
    """All tasks, whole and row by row."""
    names = [CHOICES["task"], TEXTS["task"], SUMS["task"]]
    mine = evaluated(tasks, cache, f"r1pipe:checkpoint={ours}", names, **more)
    peer = evaluated(tasks, cache, f"hf:pretrained={theirs},dtype=float32", names, **more)
    for name in names:
        for key, value in peer["results"][name].items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert mine["results"][name][key] == expected, (name, key)
        for own, other in zip(mine["samples"][name], peer["samples"][name], strict=True):
            assert own["arguments"] == other["arguments"]
            told, expected = (flat(sample["filtered_resps"]) for sample in (own, other))
            assert told == [
                pytest.approx(one, rel=1e-4, abs=1e-4) if isinstance(one, float) else one for one in expected
            ]
    generated = [sample["filtered_resps"][0] for sample in mine["samples"][SUMS["task"]]]
    assert len(set(generated)) > 1, "the model must say something for this to mean anything"


def flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in flat(part)]
    return [value]


def test_numbers_are_those_of_the_model_hf_on_the_export(tasks, exported, tmp_path):
    compare(tasks, tmp_path, exported, exported)


def test_numbers_are_those_of_the_model_hf_for_a_model_of_transformers(tasks, tmp_path):
    folder = write_model(tmp_path / "qwen", "qwen3")
    compare(tasks, tmp_path / "cache", folder, folder)


def test_chats_are_written_by_the_checkpoints_own_template(tasks, exported, tmp_path):
    compare(
        tasks,
        tmp_path,
        exported,
        exported,
        apply_chat_template=True,
        num_fewshot=1,
        fewshot_as_multiturn=True,
    )


def adapter(**more: Any) -> Any:
    from r1pipe.lm_eval.adapter import Checkpoint

    return Checkpoint(str(BASE), **more)


def test_sampled_completions_follow_the_seed_and_end_at_a_stop_string():
    from lm_eval.api.instance import Instance

    def drawn(model: Any, **more: Any) -> list[str]:
        given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, **more}
        return model.generate_until(
            [Instance("generate_until", {}, (ROWS[0]["question"], given), i) for i in range(4)]
        )

    first = drawn(adapter())
    assert first == drawn(adapter()) and len(set(first)) > 1, "each row draws for itself"
    assert first != drawn(adapter(seed=1))
    stopped = drawn(adapter(), until=["<think>", first[0][-3:]])
    assert stopped[0] == first[0].split("<think>")[0].split(first[0][-3:])[0]
    with pytest.raises(ConfigError, match=r"typical_p=0\.5 is not supported"):
        drawn(adapter(), typical_p=0.5)
    with pytest.raises(ConfigError, match="leaves no room"):
        drawn(adapter(), max_gen_toks=5000)


def run_of(folder: Path, tasks: Path, *words: str) -> Path:
    """A run folder that evaluates the bundled base on a task, as `r1pipe eval` leaves it for the job."""
    folder.mkdir(parents=True)
    more = [f"benchmark.harness.tasks={tasks}", "engine.ranks=1", "engine.threads=1"]
    config = compose(["stage=evaluate", "parent=any", *more, *words]).config
    weights = ParentRef("base", "bundled", str(BASE), manifest_hash(BASE))
    write_json(folder / "config.json", to_mapping(replace(config, weights_from=weights)))
    return folder


def test_an_evaluation_of_ours_has_the_tasks_numbers(tasks, exported, tmp_path):
    load_stage("evaluate").main(run_of(tmp_path / "run", tasks, "benchmark=lm_eval/which_sum"))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    peer = evaluated(tasks, tmp_path, f"hf:pretrained={exported},dtype=float32", ["which_sum"])
    expected = peer["results"]["which_sum"]
    own = found["lm_eval"]["results"]["which_sum"]
    assert own["acc,none"] == expected["acc,none"] and own["acc_norm,none"] == expected["acc_norm,none"]
    assert found["pass_at_1"] == expected["acc,none"] and found["problems"] == 7
    low, high = found["pass_at_1_ci"]
    assert 0 <= low < found["pass_at_1"] < high <= 1
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["metrics"]["benchmark"] == "lm_eval/which_sum"
    rows = json.loads((tmp_path / "run" / "lm_eval.json").read_text())["samples"]["which_sum"]
    assert len(rows) == 7 and rows[0]["acc"] in (0, 1)


def test_the_first_problems_and_a_chat(tasks, tmp_path):
    words = ["benchmark=lm_eval/say_sum", "stage.eval.problems=3", "stage.eval.max_tokens=40"]
    load_stage("evaluate").main(run_of(tmp_path / "run", tasks, *words, "benchmark.harness.chat=true"))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["problems"] == 3 and found["pass_at_1"] is not None
    shown = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert "<｜User｜>" in shown[0]["question"] and shown[0]["completion"]


def test_what_cannot_be_measured_is_refused_before_it_runs():
    with pytest.raises(ConfigError, match="run r1pipe eval CHECKPOINT benchmark=lm_eval/TASK"):
        compose(["stage=evaluate", "parent=any", "benchmark=lm_eval"])
    with pytest.raises(ConfigError, match=r"stage\.eval\.temperature is the task's own"):
        compose(["stage=evaluate", "parent=any", "benchmark=lm_eval/gsm8k", "stage.eval.temperature=1"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: mine\ndoc_to_text: !function utils.f\n", "mine.yaml:2: !function utils.f would run code"),
        ("%TAG !e! !func\n---\nx: !e!tion utils.f\n", "mine.yaml:3: !function utils.f would run code"),
        ("x: !!python/name:os.system ''\n", "mine.yaml:1: tag:yaml.org,2002:python/name:os.system would run"),
        ("task: mine\ninclude: ../more.txt\n", "more.txt:1: !function os.system would run code"),
        ("metric_list:\n- {metric: acc}\n- {metric: ./mine}\n", "mine.yaml:3: metric: ./mine would run"),
        ("metric_list: [{metric: rouge}]\n", "mine.yaml:1: metric: rouge would run code"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate: true would run code"),
        ("task: mine\nunsafe_code: yes\n", "unsafe_code: yes would run code"),
        ("task: mine\n x: [\n", "mine.yaml:2 is not YAML"),
        ("include: gone.yaml\n", "gone.yaml cannot be read (No such file or directory)"),
    ],
)
def test_a_folders_tasks_run_no_code_unless_they_are_trusted(tmp_path, text, told):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "more.txt").write_text("doc_to_text: !function os.system\n")
    (folder / "mine.yaml").write_text(text)

    def check(folder: Path, *words: str) -> None:
        words = ("benchmark=lm_eval/mine", f"benchmark.harness.tasks={folder}", *words)
        check_tasks(compose(["stage=evaluate", "parent=any", *words]).config.benchmark, {"acc"})

    with pytest.raises(DataError) as refused:
        check(folder)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    check(folder, "benchmark.harness.trust_code=true")
    (folder / "mine.yaml").write_text("x: &a [*a]\nunsafe_code: false\nmetric_list: [{metric: acc}]\n")
    check(folder)
    with pytest.raises(DataError, match="is no folder"):
        check(tmp_path / "more.txt")


def test_a_folders_tasks_are_refused_before_weights_are_loaded(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("r1pipe.train.loading.load_weights", None)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\nmetric_list: [{metric: rouge}]\n")
    with pytest.raises(SystemExit):
        load_stage("evaluate").main(run_of(tmp_path / "run", tmp_path / "tasks", "benchmark=lm_eval/mine"))
    assert "metric: rouge would run code" in (tmp_path / "run" / "error.txt").read_text()


def test_templates_of_a_folders_tasks_reach_their_row_alone(monkeypatch):
    from lm_eval import utils

    from r1pipe.lm_eval.measuring import sandbox_templates

    monkeypatch.setattr(utils, "env", utils.env)
    sandbox_templates()
    assert utils.apply_template("{{a.upper() | regex_replace('B', 'c')}}\n", {"a": "ab"}) == "Ac\n"
    with pytest.raises(SecurityError):
        utils.apply_template("{{a.__class__.__mro__[1].__subclasses__()}}", {"a": ""})


@pytest.mark.slow  # all of lm_eval's tasks are read
def test_a_task_that_is_not_there_is_one_line(tasks, tmp_path):
    with pytest.raises(SystemExit) as left:
        load_stage("evaluate").main(run_of(tmp_path / "run", tasks, "benchmark=lm_eval/no_such_task"))
    assert left.value.code == 2
    assert "no such task" in (tmp_path / "run" / "error.txt").read_text()


@pytest.mark.slow
def test_the_command_is_lm_evals_own(tasks, tmp_path):
    line = [sys.executable, "-m", "r1pipe.lm_eval", "--model", "r1pipe", "--model_args", f"checkpoint={BASE}"]
    line += [
        "--tasks",
        "which_sum",
        "--include_path",
        str(tasks),
        "--output_path",
        str(tmp_path / "out"),
        "--limit",
        "3",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(found.read_text())
    assert content["results"]["which_sum"]["acc,none"] >= 0 and content["config"]["model"] == "r1pipe"
