"""The bundled base: whole, with its record beside it, and the same curve when it is trained again."""

import json
from dataclasses import replace

import pytest
from tiny_runs import load_stage

from r1pipe.config import to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.paths import content_dir
from r1pipe.data import open_data
from r1pipe.runs import checkpoints

BASE = content_dir() / "base"
RECORD = json.loads((BASE / "record.json").read_text(encoding="utf-8"))
CURVE = [json.loads(line) for line in (BASE / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
STEPS = 21  # of the warm-up, which does not depend on how many follow; the curve's second point


def test_base_is_what_its_record_says():
    checkpoints.verify(BASE, RECORD["checkpoint_hash"])
    config = compose(["recipe=laptop", "stage=pretrain", f"seed={RECORD['seed']}"]).config
    assert RECORD["steps"] == config.stage.max_steps == CURVE[-1]["step"] + (RECORD["steps"] - 1) % 20
    assert open_data(config.data, config.seed).hash == RECORD["data_hash"]
    assert RECORD["metrics"]["format_rate"] < 0.3


def test_retraining_gives_the_same_curve(tmp_path):
    """The first steps of `make pretrain`, on one rank instead of two: the same sums in another order."""
    short = f"stage.max_steps={STEPS} stage.eval.problems=2 stage.eval.samples=1 stage.eval.general=0"
    quick = "stage.eval.greedy=false stage.eval.max_tokens=4 stage.eval.shown=1 engine.ranks=1"
    config = compose(["recipe=laptop", "stage=pretrain", *short.split(), *quick.split()]).config
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_mapping(replace(config, weights_from=None))))
    load_stage("pretrain").main(str(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    again = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    for point in CURVE[:2]:
        assert again[point["step"]] == pytest.approx(point["train/loss"], rel=2e-3)
    assert again[STEPS] < again[1] - 1
