"""`r1pipe plan`: its answers for scripts and for people, its search, its what-ifs and its mistakes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1pipe.cli import planning as shown
from r1pipe.cli.commands import app
from r1pipe.config.planning import check_layout
from r1pipe.core.errors import ConfigError
from r1pipe.plan import planner, sizes
from r1pipe.plan.memory import Memory

CLUSTER = ("recipe=cluster", "cluster=h800x2048", "cluster.devices=512")
BUNDLED = ("engine.sampler=bundled", "sampler.url=null")


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False, standalone_mode=False)
    assert result.return_value == code, result.output
    return result.output


def test_the_command_answers_scripts() -> None:
    found = json.loads(run("plan", "model=v3", "cluster=h800x2048", "--json"))
    hours = found["gpu_hours"]
    assert set(hours) == {"pretraining", "context_extension", "post_training", "total"}
    assert hours["total"] == pytest.approx(sum(hours.values()) / 2)
    assert found["usd"] == pytest.approx(2 * hours["total"])
    assert found["fits"] is True and found["memory_gb"] < 80
    seconds = found["phases"][0]["seconds"]
    assert sum(seconds.values()) == pytest.approx(found["phases"][0]["step_s"])
    held = found["phases"][0]["memory_gb_by_part"]
    assert held["weights"] + held["gradients"] + held["moments"] + held["activations"] < found["memory_gb"]


def test_prices_and_mfu_can_be_asked_for() -> None:
    words = ("plan", "model=v3", "cluster=h800x2048", "--json")
    found = json.loads(run(*words, "--what-if", "cluster.usd_per_hour=1,3", "--what-if", "layout.mfu=0.4"))
    one, three, mfu = found["what_if"]
    assert three["usd"] == pytest.approx(3 * one["usd"]) and one["gpu_hours"] == found["gpu_hours"]["total"]
    *given, phases = shown.plan_inputs(["model=v3", "cluster=h800x2048", "layout.mfu=0.4"])
    again = planner.planned(*given, phases[0])
    assert again.mfu == pytest.approx(0.4, rel=0.01) and mfu["gpu_hours"] != one["gpu_hours"]


def test_what_does_not_fit_says_so_and_a_search_finds_what_does() -> None:
    words = ("model=moonlight", "stage=pretrain", "stage.max_steps=100", "stage.batch_size=64")
    words = (*words, "stage.sequence_length=4096", "cluster=h100x8")
    given = json.loads(run("plan", *words, "layout.zero_level=0", "--json", code=1))
    assert not given["fits"] and given["memory_gb"] > 80
    found = json.loads(run("plan", *words, "--search", "--json"))
    assert found["fits"] and found["layouts_that_fit"] > 10
    model, cluster, layout, phases = shown.plan_inputs(list(words))
    every = [planner.plan(model, cluster, one, phases) for one in planner.layouts(model, cluster, layout)]
    fastest = min((plan for plan in every if plan.fits), key=lambda plan: plan.hours["total"])
    assert found["gpu_hours"]["total"] == pytest.approx(fastest.hours["total"])


def test_reinforcement_waits_for_its_longest_answer() -> None:
    words = ["stage=grpo", "model=v3", *CLUSTER, "layout=v3", "layout.pipeline=8", *BUNDLED]
    whole, half = (
        planner.planned(*given, phase)
        for *given, [phase] in map(shown.plan_inputs, (words, [*words, "stage.sampling.max_tokens=16384"]))
    )
    assert whole.step.sampling == pytest.approx(2 * half.step.sampling, rel=0.05)
    assert whole.memory.frozen > 0 and whole.memory.cache == pytest.approx(2 * half.memory.cache, rel=0.01)


def test_a_stage_is_planned_as_its_engine_would_run_it() -> None:
    words = ["stage=grpo", "model=v3", *CLUSTER, *BUNDLED, "engine.offload=false"]
    model, cluster, layout, [phase] = shown.plan_inputs(words)
    assert (layout.zero_level, layout.precision, layout.recompute, layout.pipeline) == (3, "bf16", "full", 1)
    held = planner.planned(model, cluster, layout, phase).memory
    whole = 2 * sizes.without_mtp(model)
    assert held.sampler + held.weights == pytest.approx(whole), "every rank gathers the policy to sample"
    assert held.frozen == pytest.approx(whole / 512), "and has its share of the reference"


@pytest.mark.parametrize("given", [("recipe=node", "cluster=h100x8"), CLUSTER], ids=["node", "cluster"])
@pytest.mark.parametrize("stage", ["cold_start", "grpo", "rejection_sft", "all_scenario", "zero"])
def test_recipes_leave_a_tenth_of_their_gpus(stage: str, given: tuple[str, ...]) -> None:
    words = [f"stage={stage}", *given]
    length = [] if stage in ("grpo", "zero", "all_scenario") else ["stage.max_steps=100"]
    planned = json.loads(run("plan", *words, *length, "--json"))
    assert 0.5 * 80 < planned["memory_gb"] < 0.9 * 80


def test_a_server_elsewhere_takes_no_memory_and_one_here_its_share() -> None:
    def held(*more: str) -> Memory:
        words = ["stage=grpo", "recipe=node", "cluster=h100x8", *more]
        model, cluster, layout, [phase] = shown.plan_inputs(words)
        return planner.planned(model, cluster, layout, phase).memory

    here, elsewhere = held(), held("sampler.url=http://host:8000", "sampler.args=[]")
    assert (here.sampler, here.cache) == (0, pytest.approx(16e9))
    assert here.total - elsewhere.total == pytest.approx(16e9 - elsewhere.activations - elsewhere.logits)
    assert held("engine.sampler=bundled").sampler > 20e9


def test_a_server_decodes_on_as_many_gpus_as_its_arguments_say() -> None:
    words = ["stage=grpo", "recipe=node", "cluster=h100x8"]
    found = [
        shown.plan_inputs([*words, *more])[2].sampler_ranks
        for more in (
            [],
            ["sampler.args=['--tensor-parallel-size=4']"],
            ["engine.sampler=bundled", "sampler.args=[]"],
        )
    ]
    assert found == [8, 4, 1]
    with pytest.raises(ConfigError, match=r"sampler.args: --tensor-parallel-size is all; give a number"):
        shown.plan_inputs([*words, "sampler.args=[-tp, all]"])
    with pytest.raises(ConfigError, match=r"layout.sampler_ranks=3 must divide cluster.devices=8"):
        model, cluster, layout, _ = shown.plan_inputs([*words, "layout.sampler_ranks=3"])
        check_layout(layout, cluster, model)


def test_the_page_shows_every_part(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    run("plan", "model=v3", "cluster=h800x2048", "--html", str(page))
    text = page.read_text()
    for part in ("products", "all to all", "bubble", "gradients", "activations"):
        assert part in text
    assert text.count("<svg") == 2 and "It fits" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=v3", "which cluster"),
        ("model=v3 cluster=h800", "cluster=h800: no such cluster; did you mean h800x2048"),
        ("model=v3 cluster=h800x2048 cluster.price=1", "cluster.price is no key"),
        ("model=v3 cluster=h800x2048 layout.pipeline=3", "layout.pipeline=3 must divide"),
        ("model=v3 cluster=h800x2048 layout.expert_parallel=3", "layout.expert_parallel=3 must divide"),
        ("model=v3 cluster=a100x8 layout=v3 layout.pipeline=1 layout.expert_parallel=1", "has no FP8"),
        ("model=moonlight cluster=h100x8", "layout=default has no phases; give stage=NAME"),
        ("model=v3 cluster=h800x2048 stage=cold_start", "stage.max_steps=0"),
        ("model=v3 cluster=h800x2048 stage=base", "stage=base cannot be planned"),
        ("recipe=cluster cluster=h800x2048 stage=grpo", "must be a multiple of the 2048 ranks"),
        ("recipe=cluster cluster=h800x2048 stage=cold_start stage.max_steps=9", "of cluster.devices=2048"),
        ("model=v3 cluster=h100x8 --search", "no layout is possible on cluster=h100x8"),
        (
            "model=v3 cluster=h100x8 stage=pretrain stage.batch_size=8 --search",
            "none of .* layouts fits cluster=h100x8",
        ),
        ("model=v3 cluster=h800x2048 --what-if stage.lr=1", "give KEY=VALUES"),
    ],
)
def test_mistakes_are_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("plan", *words.split())


def test_the_page_on_planning_shows_real_answers() -> None:
    """docs/plan.md: its output is this machine's, and each of its commands runs."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    [printed] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    real = run("plan", "model=v3", "cluster=h800x2048")
    assert [line.rstrip() for line in real.splitlines()] == printed.splitlines()
    commands = re.findall(r"^r1pipe (plan .*)$", page, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        fits = "engine.pipeline" not in command
        run(*shlex.split(command), code=0 if fits else 1)
