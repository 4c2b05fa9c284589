"""Run folders of stages so small that a test can run them in its own process."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from r1pipe.config import ParentRef, RunConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.paths import stages_dir

TINY = [
    *("recipe=smoke", "engine.ranks=1", "engine.threads=1"),
    *("model.hidden_size=32", "model.intermediate_size=32", "model.moe_intermediate_size=16"),
    *("model.num_hidden_layers=2", "model.num_attention_heads=2", "model.kv_lora_rank=16"),
    *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8"),
    *("stage.eval.problems=2", "stage.eval.samples=1", "stage.eval.general=0", "stage.eval.max_tokens=4"),
    *("stage.eval.greedy=false", "stage.eval.every=0", "stage.eval.shown=1"),
]
EASY_WORLD = ["data.tasks=[word]", "data.languages=[en]"]


def tiny_config(*overrides: str) -> RunConfig:
    """The config of a tiny model's run; without parents, so that its weights are random."""
    of_world = not any(word.startswith("data=") for word in overrides)
    return compose([*TINY, *(EASY_WORLD if of_world else []), *overrides]).config


def tiny_run(
    folder: Path,
    *overrides: str,
    weights: ParentRef | None = None,
    teacher: ParentRef | None = None,
    **reads: ParentRef,
) -> Path:
    """The folder as `r1pipe run` leaves it for the job; `reads`: the checkpoints that are read besides;
    `teacher`: the teacher, where it is a checkpoint."""
    folder.mkdir(parents=True)
    named = [f"teacher={teacher.run_id}"] if teacher else []
    config = tiny_config(*overrides, *named)
    config = replace(config, weights_from=weights, reads_from=reads, teacher_from=teacher)
    (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    return folder


SHARED_SCRIPTS = {
    "expert_iteration": "rejection_sft",
    "cold_start": "sft",
    "control_sft": "sft",
    "zero": "grpo",
    "all_scenario": "grpo",
}


def load_stage(name: str) -> ModuleType:
    """The script of a stage, or of this name, as a module: its `main(folder)` runs in this process."""
    name = SHARED_SCRIPTS.get(name, name)
    spec = importlib.util.spec_from_file_location(f"stage_{name}", stages_dir() / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
