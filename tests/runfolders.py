"""Builds run folders as jobs leave them, for the tests of tracking, tables and report: no job is run."""

import json
import math
import random
from pathlib import Path

from r1pipe.core.reflection import corrections
from r1pipe.runs.checkpoints import manifest_hash

STAGES = ["base", "cold_start", "grpo", "rejection_sft", "reward_model", "all_scenario"]
CONTROLS = ["zero", "control_sft"]
ACCURACY = {
    "base": 0.31,
    "cold_start": 0.44,
    "grpo": 0.79,
    "rejection_sft": 0.78,
    "all_scenario": 0.80,
    "zero": 0.55,
    "control_sft": 0.71,
}
TASKS = ("countdown", "program", "word")


def config(stage: str, root: Path, seed: int = 0, **tracking) -> dict:
    """A config.json with the keys that the command line reads."""
    return {
        "seed": seed,
        "root": str(root),
        "pipeline": "laptop",
        "parent": None,
        "model": {"name": "laptop", "hidden_size": 128, "num_hidden_layers": 4},
        "data": {
            "name": "world",
            "kind": "world",
            "path": None,
            "tasks": list(TASKS),
            "languages": ["en", "zh"],
        },
        "engine": {"name": "cpu", "ranks": 2, "threads": 1, "accelerator": "cpu", "zero_level": 0},
        "stage": {"name": stage, "script": f"{stage}.py", "optim": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        "recipe": {"name": "laptop", "stages": STAGES, "controls": CONTROLS},
        "tracking": {
            "enabled": True,
            "uri": None,
            "experiment": "r1pipe",
            "model_name": "r1pipe",
            **tracking,
        },
    }


def evaluation(stage: str, seed: int = 0) -> dict:
    accuracy = ACCURACY.get(stage)
    if accuracy is None:
        nothing = dict.fromkeys(
            ("pass_at_1", "pass_at_1_ci", "greedy", "cons_at_k", "general_score", "by_task")
        )
        judges = {
            "helpful": {"pairs": 400, "accuracy": 0.91},
            "harmless": {"labels": 400, "accuracy": 0.97, "auc": 0.99},
        }
        return {**nothing, "reward_models": judges}
    accuracy += 0.01 * seed
    late = stage in ("rejection_sft", "all_scenario")
    return {
        "pass_at_1": accuracy,
        "pass_at_1_ci": [accuracy - 0.02, accuracy + 0.02],
        "greedy": accuracy + 0.01,
        "cons_at_k": accuracy + 0.03,
        "k": 4,
        "problems": 500,
        "samples": 2000,
        "format_rate": 0.24 if stage in ("base", "zero") else 0.98,
        "language_consistency": 0.93 if stage in ("base", "zero") else 0.99,
        "length_mean": 66.4 + 20 * (stage == "grpo"),
        "truncation_rate": 0.012,
        "by_task": {
            task: {"pass_at_1": accuracy + 0.05 * (i - 1), "samples": 667} for i, task in enumerate(TASKS)
        },
        "by_language": {
            "en": {"pass_at_1": accuracy, "samples": 1000},
            "zh": {"pass_at_1": accuracy, "samples": 1000},
        },
        "general_score": 0.91 if late else 0.04,
        "general_by_kind": dict.fromkeys(
            ("writing", "facts", "identity", "translation"), 0.91 if late else 0.04
        ),
        "preference_score": 0.83 if stage == "all_scenario" else 0.62 if late else 0.1,
        "refusal_rate": 0.97 if stage == "all_scenario" else 0.6,
        "safe_answer_rate": 0.99,
        "reflection_rate": 0.06 if stage == "grpo" else 0.01,
        "level_4": accuracy / 4,
        "pass_at_1_within": {str(n): accuracy * n / 352 for n in (16, 64, 256, 352)},
        "strategies": {"stepwise": accuracy, "give_up": 1 - accuracy},
    }


def samples(stage: str) -> list[dict]:
    """The same two prompts after every stage."""
    right = ACCURACY.get(stage, 0) > 0.5
    return [
        {
            "prompt_id": "countdown-1",
            "task": "countdown",
            "language": "en",
            "question": "Use 5, 9 and 14 to make 28.",
            "answer": "28",
            "completion": f"<think>\n5+9=14+14={28 if right else 29}\n</think>\n\n5 + 9 + 14 <{stage}>",
            "correct": right,
            "truncated": False,
        },
        {
            "prompt_id": "word-2",
            "task": "word",
            "language": "zh",
            "question": "小明有3个苹果，又买了4个，一共几个？",
            "answer": "7",
            "completion": "<think>\n3+4=7\n</think>\n\n一共7个。" if right else "<think>\n3+4",
            "correct": right,
            "truncated": not right,
        },
    ]


def metric_lines(stage: str, steps: int, seed: int = 0) -> list[dict]:
    noise = random.Random(f"{stage}{seed}")
    lines = []
    for step in range(1, steps + 1):
        rise = 1 - math.exp(-3 * step / steps)
        line = {
            "step": step,
            "time": 2.5 * step,
            "train/loss": 0.9 - 0.3 * rise,
            "train/lr": 3e-4,
            "train/grad_norm": 0.8,
        }
        if stage in ("grpo", "zero", "all_scenario"):
            line |= {
                "reward": 0.6 + 0.5 * rise + noise.gauss(0, 0.03),
                "completions/mean_length": 66 + 22 * rise,
                "rewards/accuracy/mean": 0.44 + 0.36 * rise + noise.gauss(0, 0.03),
                "kl": 0.05 * rise,
                "entropy": 0.5 - 0.3 * rise,
                "reflection_rate": 0.01 + 0.05 * rise,
                "completions/clipped_ratio": 0.08 * (1 - rise),
                "strategy/stepwise": 0.3 + 0.6 * rise,
                "strategy/guess": 0.4 - 0.35 * rise,
                "strategy/give_up": 0.3 - 0.25 * rise,
                "time/sampling_s": 1.0,
                "time/update_s": 1.4,
            }
            if step % 8 == 0:
                line["eval/pass_at_1"] = 0.44 + 0.35 * rise
                line["eval/level_4"] = 0.1 + 0.1 * rise
        lines.append(line)
    return lines


WRONG = "<think>\nFirst 12+7=18.\n18*3=54.\n</think>\n\n54"
MENDED = "<think>\nFirst 12+7=18.\n18-7=11?12 no\nWait, 12+7=19.\n19*3=57.\n</think>\n\n57"
DEV_STEPS = {"base": [0], "cold_start": [64], "grpo": [0, 8, 64]}  # of the short evaluations


def dev_evaluations(stage: str) -> list[dict]:
    """Of one problem; GRPO's last step mends its own error."""
    asked = {"prompt_id": "word-9", "task": "word", "language": "en", "question": "<12> and 7, times 3?"}
    lines = []
    for step in DEV_STEPS.get(stage, []):
        learned = stage == "grpo" and step > 8
        said = {"completion": MENDED if learned else WRONG, "tokens": 40, "truncated": False}
        said["corrections"] = corrections(said["completion"])
        sample = asked | {"answer": "57"} | said | {"correct": learned}
        metrics = {"eval/pass_at_1": 0.3 + step / 200, "eval/level_4": 0.1}
        lines.append({"step": step, "metrics": metrics, "samples": [sample]})
    return lines


def write_lines(path: Path, lines: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def record(stage: str, run_id: str, seed: int, created: str, steps: int) -> dict:
    before = {"grpo": "cold_start", "all_scenario": "rejection_sft", "base": None}.get(stage, "base")
    parent = {
        "stage": before,
        "run_id": f"{before}-{seed}",
        "checkpoint": f"/runs/{before}-{seed}/checkpoints/step-9",
        "hash": "1f" * 16,
    }
    sampled = {
        "stage": "grpo",
        "run_id": f"grpo-{seed}",
        "checkpoint": f"/runs/grpo-{seed}/checkpoints/step-9",
        "hash": "2e" * 16,
    }
    return {
        "run_id": run_id,
        "stage": stage,
        "seed": seed,
        "pipeline": "laptop",
        "created": created,
        "wall_s": 100.0 + len(stage),
        "seconds": {"train": 70.0, "sampling": 20.0, "evaluating": 12.5},
        "parents": {
            "weights": parent if before else None,
            "data": [sampled] if stage == "rejection_sft" else [],
        },
        "config_hash": "c0" * 16,
        "data_hash": "da" * 32,
        "code": {"revision": "abc1234", "dirty": True},
        "tokenizer_hash": "70" * 16,
        "template_hash": "7e" * 16,
        "checkpoint": f"checkpoints/step-{steps}",
        "checkpoint_hash": "cc" * 16,
        "steps": steps,
        "metrics": evaluation(stage, seed),
        "versions": {"torch": "2.13.0"},
    }


FUNNEL = [
    {
        "name": "correct",
        "kept": 2960,
        "dropped": 1040,
        "examples": [{"question": "1+1?", "completion": "<think>\n3"}],
    },
    {"name": "one language", "kept": 2904, "dropped": 56, "examples": []},
    {"name": "duplicates", "kept": 1800, "dropped": 1104, "examples": ["5+9=14"]},
]


def build(
    root: Path,
    stage: str,
    seed: int = 0,
    created: str = "2026-01-01T10:00:00",
    finished: bool = True,
    steps: int = 64,
    run_id: str = "",
    **tracking,
) -> Path:
    """Writes `<root>/<stage>-<seed>` as a job leaves it; returns the folder."""
    folder = root / (run_id or f"{stage}-{seed}")
    write_json(folder / "config.json", config(stage, root, seed, **tracking))
    write_lines(folder / "metrics.jsonl", metric_lines(stage, 0 if stage == "base" else steps, seed))
    if dev := dev_evaluations(stage):
        write_lines(folder / "dev_evaluations.jsonl", dev)
    write_json(folder / "env.json", {"python": "3.11", "cores": 2})
    if finished:
        checkpoint = folder / "checkpoints" / f"step-{steps}"
        write_json(checkpoint / "config.json", {"model_type": "deepseek_v3"})
        write_json(checkpoint / "manifest.json", {"files": {"config.json": "aa"}})
        write_json(folder / "evaluation.json", evaluation(stage, seed))
        write_json(folder / "samples.json", samples(stage))
        if stage == "rejection_sft":
            write_json(folder / "data" / "funnel.json", FUNNEL)
        made = {"checkpoint_hash": manifest_hash(checkpoint)}
        write_json(folder / "record.json", record(stage, folder.name, seed, created, steps) | made)
    return folder


def build_all(root: Path, seeds: tuple[int, ...] = (0,)) -> None:
    """A whole reproduction, controls included."""
    for seed in seeds:
        for stage in STAGES + CONTROLS:
            build(root, stage, seed)
