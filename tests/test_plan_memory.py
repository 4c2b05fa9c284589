"""The planner's memory, against what autograd keeps, DeepSpeed's estimators and the check before a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import engine_config
from shapes import ours, tiny
from test_plan import ON_CORES, shape
from torch import Tensor

from r1pipe.cli import planning as shown
from r1pipe.config.compose import compose
from r1pipe.config.planning import PhaseConfig, planning
from r1pipe.model import DeepseekV3
from r1pipe.model.kernels import training as kernels
from r1pipe.plan import answerers, footprint, planner, sizes
from r1pipe.plan.cut import cuts
from r1pipe.plan.memory import GIGA, in_flight, memory
from r1pipe.plan.planner import Phase
from r1pipe.train.engine.pipeline_groups import owner_of


@pytest.mark.parametrize(("name", "measured"), [("bench", 1015), ("laptop", 611)])
def test_memory_measured_of_training_in_one_process(name: str, measured: float) -> None:
    """`make bench` (docs/results.md), in MiB: one process of two threads, 16 x 256 tokens in BF16."""
    model = shape(name)
    words = ["cluster.devices=1", "layout.micro_batch=16", "layout.precision=bf16"]
    phase = Phase(PhaseConfig("training", 4096, 256, 16, 1))
    found = planner.planned(model, *planning([*ON_CORES, *words], model), phase)
    assert found.memory.total == pytest.approx(measured * 2**20, rel=0.1)


def test_a_heap_keeps_what_training_has_freed() -> None:
    """On GPUs sampling takes it over."""
    for machines, keeps in (("laptop", True), ("h100x8", False)):
        words = ["stage=grpo", "recipe=laptop", f"cluster={machines}", "cluster.devices=2"]
        *given, [phase] = shown.plan_inputs(words)
        held = planner.planned(*given, phase).memory
        training, sampling = held.activations + held.logits, held.sampler + held.cache
        kept = held.buffers - given[1].reserved_gb * GIGA
        assert kept == pytest.approx(min(training, sampling) + planner.LANGUAGES if keeps else 0, abs=1)


ROWS = {"q_lora_rank": 48, "qk_nope_head_dim": 32, "num_experts_per_tok": 3, "n_shared_experts": 2}


@pytest.mark.parametrize(("changed", "length"), [({}, 288), ({}, 64), (ROWS, 128)])
def test_what_torchs_operators_keep_of_a_pass(
    changed: dict[str, int], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By autograd's own hooks, without the compiled kernels."""
    monkeypatch.setattr(kernels, "usable", lambda *of, **how: False)
    model = replace(shape("laptop"), **changed)
    trunk = DeepseekV3(model, torch.Generator().manual_seed(0)).train().model
    own = {weight.untyped_storage().data_ptr() for weight in trunk.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    tokens = torch.zeros(2, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trunk(tokens, segments_BT=torch.ones_like(tokens))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4 / tokens.numel()
    assert sizes.stored(model, "none", length) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("nodes", [1, 4])
def test_deepspeeds_estimators(nodes: int) -> None:
    """DeepSpeed has one for level 2 and one for level 3, which differ on gradients; none for level 1."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    weights, largest, ranks = 2851 * 10**6, 32 * 10**6, 8 * nodes
    each = {"weight": 2, "optimizer": 12, "ranks": ranks}
    of_level_2 = sizes.states(weights, weights, level=2, gradient=2 + 4, **each)
    of_level_3 = sizes.states(weights, weights, level=3, gradient=4, **each)
    _, theirs = estimate_zero2_model_states_mem_needs(weights, 8, nodes, cpu_offload=False)
    assert int(of_level_2.total) == theirs
    _, theirs, buffers = estimate_zero3_model_states_mem_needs(weights, largest, 8, nodes, cpu_offload=False)
    assert buffers == 4 * largest
    assert int(of_level_3.total) + buffers == theirs


@pytest.mark.parametrize(
    "words",
    [
        "stage=cold_start model=moonlight engine.zero_level=2 stage.batch_size=16 stage.sequence_length=8192",
        "stage=pretrain engine=cpu data=world stage.max_steps=9",
        "stage=grpo stage.max_tokens_per_micro_batch=65536 engine.zero_level=2 stage.sampling.max_tokens=512",
        "stage=grpo engine.recompute=false stage.max_tokens_per_micro_batch=65536 stage.kl_coef=0",
        "stage=all_scenario stage.max_tokens_per_micro_batch=65536 engine.moments=bf16",
        "stage=grpo engine.offload=true engine.zero_level=3 engine.sampler=vllm sampler.url=http://host:80",
        "stage=pretrain model=moonlight engine.zero_level=1 engine.pipeline=4 engine.expert_parallel=2",
        "stage=grpo model=moonlight engine.zero_level=1 engine.pipeline=2 engine.expert_parallel=4 "
        "engine.sampler=vllm sampler.url=http://host:80",
        "stage=reward_model stage.batch_size=64 engine.zero_level=2 engine.gradient_accumulation=2",
        "stage=distill teacher=grpo engine.zero_level=1 stage.batch_size=16",
        "stage=rejection_sft engine.sampler=bundled engine.zero_level=3 stage.batch_size=16",
        "stage=cold_start model=moonlight engine.zero_level=1 engine.pipeline=4 engine.schedule=zbv "
        "engine.recompute=false stage.batch_size=16",
    ],
)
def test_the_check_before_a_run_and_the_planner_agree(words: str) -> None:
    given = [
        "recipe=gpu",
        "engine.ranks=8",
        "stage.max_steps=400",
        "stage.eval.max_tokens=512",
        *words.split(),
    ]
    config = compose(given).config
    need = footprint.needed(config, prompt=100)
    asked = [*given, "cluster=h100x8", "layout.prompt_tokens=100"]
    model, cluster, layout, phases = shown.plan_inputs(asked)
    every = [planner.planned(model, cluster, layout, phase).memory for phase in phases]
    held = max(every, key=lambda one: one.total)
    assert held.total - held.buffers == pytest.approx(need.peak)
    assert held.logits == need.logits and held.cache == need.cache


def test_a_pipeline_and_experts_share_what_zero_does_not() -> None:
    """Megatron's 6 + 12 / DP bytes of a weight, experts over their own ranks; all ranks alike."""
    model = shape("v3")
    for schedule, copies in (("zb1p", 1), ("dualpipe", 2)):
        words = ["layout.pipeline=16", "layout.expert_parallel=64", f"layout.schedule={schedule}"]
        given = ["cluster=h800x2048", "layout=default"]
        cluster, layout = planning([*given, "layout.zero_level=1", *words], model)
        held = memory(model, layout, cluster, 4096, 120)
        routed = sizes.routed(model)
        dense, experts = (sizes.parameters(model) - routed) / 16, routed / 16 / 64
        assert held.weights + held.gradients == pytest.approx(6 * copies * (dense + experts))
        assert held.moments == pytest.approx(12 * (dense / 128 + experts / 2))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_a_pipeline_of_the_engine_is_counted_as_it_is_cut(schedule: str) -> None:
    model = tiny(num_hidden_layers=11, first_k_dense_replace=2, num_nextn_predict_layers=1)
    engine = replace(engine_config(), pipeline=4, schedule=schedule)
    own = [0] * 4
    for name, weight in ours(model).named_parameters():
        own[owner_of(name, 11, engine)] += weight.numel() if weight.ndim > 1 else 0
    shares = cuts(model, schedule, 4, micro_batches=3)
    assert [sizes.parameters(share.model) for share in shares] == own
    assert [share.passes for share in shares] == ([3, 3, 2, 1] if schedule == "1f1b" else [3] * 4)


@pytest.mark.parametrize(
    ("schedule", "stages", "kept"),
    [("1f1b", 1, 8), ("1f1b", 4, 8 + 7 / 4), ("zb1p", 1, 8), ("dualpipe", 1, 9)],
)
def test_activations_of_micro_batches_in_flight(schedule: str, stages: int, kept: float) -> None:
    words = ["cluster=h800x2048", f"layout.schedule={schedule}", f"layout.virtual_stages={stages}"]
    layout = planning([*words, "layout.pipeline=8"], shape("v3"))[1]
    assert in_flight(layout, 1000) == pytest.approx(kept / 8)
    assert in_flight(layout, 2) == 2 / 8, "no more than there are"


def test_teachers_and_judges_on_this_machine_are_counted(tmp_path: Path) -> None:
    """By their files, where there are any; else as large as the model. A server takes nothing."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(bytes(5000))
    base = ["stage=distill", "recipe=gpu", "engine.zero_level=1", "stage.max_steps=9", "stage.batch_size=8"]

    def need(*words: str) -> footprint.Need:
        return footprint.needed(compose([*base, *words]).config, prompt=100)

    first, server, label = need(), need("teacher=http://host/v1"), need(f"teacher={teacher}")
    assert (first.before, server.before) == (0, 0)
    cache = label.before - 5000
    assert cache > 0 and label.states == first.states, "it answers before the student trains"
    own = sizes.weight_bytes("bf16") * sizes.parameters(compose(base).config.model)
    assert need("teacher=grpo").before == pytest.approx(own + cache)
    live = need(f"teacher={teacher}", "stage.transfer=divergence")
    assert live.states == first.states + 5000 and live.before == label.before
    judged = ["stage=all_scenario", "recipe=gpu", "engine.zero_level=1", "stage.rewards.weights.judge=1"]
    by_judge = [
        footprint.states(compose([*judged, *words]).config)
        + answerers.beside(compose([*judged, *words]).config)
        for words in (["judge=http://host/v1"], [f"judge={teacher}"])
    ]
    assert by_judge[1] - by_judge[0] == 5000


def test_reward_models_are_planned_one_after_the_other() -> None:
    words = ["stage=reward_model", "recipe=gpu", "cluster=h100x8"]
    words += ["stage.batch_size=64", "stage.pairs=6400", "stage.labels=12800"]
    model, cluster, layout, phases = shown.plan_inputs(words)
    helpful, harmless = (planner.planned(model, cluster, layout, phase) for phase in phases)
    assert [phase.steps for phase in phases] == [100, 200]
    assert helpful.memory.logits == 0 and helpful.memory.activations == 2 * harmless.memory.activations
    assert helpful.step.total == pytest.approx(2 * harmless.step.total, rel=0.1), (
        "pairs, and single responses"
    )
