"""The bundled base: whole, with its record beside it, and the same curve when it is trained again."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import load_stage

from r1pipe.cli.bundle import CURVE_POINTS
from r1pipe.config import ParentRef, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.paths import content_dir
from r1pipe.data import open_data
from r1pipe.model import load_pretrained
from r1pipe.model.weights import convert
from r1pipe.runs import checkpoints
from r1pipe.train.loading import load_model

BASE = content_dir() / "base"
RECORD = json.loads((BASE / "record.json").read_text(encoding="utf-8"))
CURVE = [json.loads(line) for line in (BASE / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
EVERY = max(1, RECORD["steps"] // CURVE_POINTS)  # steps from one point of the curve to the next
STEPS = EVERY + 1  # of the warm-up, which does not depend on how many follow; the curve's second point
PRECISION = f"engine.precision={RECORD['config']['engine']['precision']}"


def test_base_is_what_its_record_says():
    checkpoints.verify(BASE, RECORD["checkpoint_hash"])
    config = compose(["recipe=laptop", "stage=pretrain", f"seed={RECORD['seed']}"]).config
    assert RECORD["steps"] == config.stage.max_steps == CURVE[-1]["step"] + (RECORD["steps"] - 1) % EVERY
    assert open_data(config.data, config.seed).hash == RECORD["data_hash"]
    assert RECORD["metrics"]["format_rate"] < 0.4


def test_retraining_gives_the_same_curve(tmp_path):
    """The first steps of `make pretrain`, in the precision that it took; sums may come in another order."""
    short = f"stage.max_steps={STEPS} stage.eval.problems=2 stage.eval.samples=1 stage.eval.general=0"
    quick = "stage.eval.greedy=false stage.eval.max_tokens=4 stage.eval.shown=1 engine.ranks=1"
    config = compose(["recipe=laptop", "stage=pretrain", PRECISION, *short.split(), *quick.split()]).config
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_mapping(replace(config, weights_from=None))))
    load_stage("pretrain").main(str(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    again = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    for point in CURVE[:2]:
        assert again[point["step"]] == pytest.approx(point["train/loss"], rel=2e-3)
    assert again[STEPS] < again[1] - 1


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_stored_in_bfloat16_are_trained_in_the_precision_of_the_engine(precision, dtype, tmp_path):
    """In bfloat16, with moments in bfloat16, most updates of a small learning rate would round to nothing."""
    convert(BASE, tmp_path / "half", "bfloat16")
    stored = {parameter.dtype for parameter in load_pretrained(tmp_path / "half").parameters()}
    parent = ParentRef("base", "half", str(tmp_path / "half"), "unchecked")
    overrides = ["recipe=laptop", "stage=cold_start", f"engine.precision={precision}", "engine.ranks=1"]
    run = SimpleNamespace(config=replace(compose(overrides).config, weights_from=parent), rank=0)
    model = load_model(run, parent, again=True, for_engine=True)
    assert stored == {torch.bfloat16} and {parameter.dtype for parameter in model.parameters()} == {dtype}
