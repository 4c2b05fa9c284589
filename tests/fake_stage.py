"""A stage without training, for tests of what launches it: writes what a job writes, in a blink.

FAKE says how it goes: `ok`, `user_error`, `crash`, `killed`, or `wait` (saves a checkpoint, then waits for a
file `go` in the root). FAKE_STEPS is how many steps it takes.
"""

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from r1pipe.config import ModelConfig, config_hash, read_config
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs import reward_model_quality as judges
from r1pipe.runs.record import own_hash


def publish(folder: Path, model: ModelConfig, weights: str, stage: str) -> str:
    """A checkpoint folder with a manifest; its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    published = {name: value for name, value in vars(model).items() if isinstance(value, int | float | bool)}
    (folder / "config.json").write_text(json.dumps(published))
    (folder / "model.safetensors").write_text(weights)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    if stage == judges.STAGE:
        for kind in judges.KINDS:
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / judges.QUALITY).write_text(json.dumps({"accuracy": 0.9, "auc": 0.9}))
    checkpoints.write_manifest(folder)
    return checkpoints.manifest_hash(folder)


def main(path: str) -> None:
    run, how = RunFolder(path), os.environ.get("FAKE", "ok")
    config = read_config(run.config)
    print(f"{config.stage.name} began")
    with (run.path / "begun").open("a") as file:  # how many times it was started, with which threads
        file.write(os.environ.get("OMP_NUM_THREADS", "?") + "\n")
    if how == "user_error":
        run.error.write_text("data.path=nowhere.json does not exist; give another\n")
        raise SystemExit(2)
    if how == "crash":
        raise RuntimeError("a tensor has the wrong shape")
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 1, "time": 0.1, "train/loss": 2.0}) + "\n")
    steps = int(os.environ.get("FAKE_STEPS", "1"))
    weights = f"weights of {run.run_id} after {steps}"
    sha = publish(run.checkpoint(steps), config.model, weights, config.stage.name)
    (run.checkpoint(steps) / checkpoints.ENGINE).mkdir(exist_ok=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":
        (run.path / "waiting").touch()
        give_up_at = time.monotonic() + 300
        while not (run.path.parent / "go").exists() and time.monotonic() < give_up_at:
            time.sleep(0.05)
    parent, reads = config.weights_from, config.reads_from.values()
    record = {
        "run_id": run.run_id,
        "stage": config.stage.name,
        "seed": config.seed,
        "pipeline": config.pipeline,
        "created": datetime.now(UTC).isoformat(),
        "wall_s": 0.1,
        "parents": {
            "weights": vars(parent) if parent else None,
            "data": [vars(read) for read in reads],
        },
        "config_hash": config_hash(config),
        "checkpoint": f"checkpoints/step-{steps}",
        "checkpoint_hash": sha,
        "steps": steps,
        "metrics": {"pass_at_1": 0.5, "problems": 4, "samples": 8},
    }
    record["record_hash"] = own_hash(record)
    partial = run.record.with_suffix(
        ".partial"
    )  # whole or not at all, as the real one: its launcher watches for it
    partial.write_text(json.dumps(record))
    partial.replace(run.record)


if __name__ == "__main__":
    main(sys.argv[1])
