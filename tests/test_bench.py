"""The bench: its arithmetic by hand, what it judges, its referee, and one tiny run from end to end."""

import dataclasses
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from bench.__main__ import main
from bench.config import Case, DenseShape, Job, Setting, load_bench, load_model, rehearsal
from bench.operations import all_weights, case_bytes, case_flops, forward_flops, roofline, weights_per_token
from bench.referee import Result, contest, fastest
from bench.tables import Row, data_sheet, rows_of, speedup, table_of, utilisation
from bench.turns import EOS, completions, lengths, rows
from forked import LIMIT_S, wait_until
from shapes import tiny

from r1pipe.core.errors import ConfigError, EnvironmentProblem

FP32, BF16 = Setting("fp32", {}), Setting("bf16", {})
CASE = Case("sample", ["laptop"], 4, 1, 8, 2, ["transformers"], {"transformers": 5.0}, {"transformers": 8.0})
MIB = 2**20


def result(contestant: str, seconds: float, memory: int = MIB, setting: Setting = FP32) -> Result:
    return Result(contestant, CASE, "laptop", setting, seconds, seconds, memory)


def judged(results: list[Result], peaks: dict[str, float], sheet: dict[str, float]) -> list[Row]:
    return rows_of(results, load_model("laptop"), peaks, 1e9, sheet)


def test_weights_per_token_by_hand():
    config = tiny(num_hidden_layers=3, first_k_dense_replace=1)  # hidden 64, 4 heads of 16+8, values 16
    queries = 64 * 24 + 24 * 4 * 24
    attention = queries + 64 * (32 + 8) + 32 * 4 * (16 + 16) + 4 * 16 * 64
    moe = 64 * 16 + (4 + 1) * 3 * 64 * 24
    assert weights_per_token(config) == 3 * attention + 3 * 64 * 96 + 2 * moe + 64 * 97


def test_attention_looks_at_every_token_up_to_itself():
    config = tiny()
    pair = 2 * 3 * 4 * (16 + 8 + 16)
    whole = forward_flops(config, 0, 5)
    assert whole == 5 * 2 * weights_per_token(config) + pair * (1 + 2 + 3 + 4 + 5)
    assert forward_flops(config, 0, 3) + forward_flops(config, 3, 5) == whole


def test_a_backward_pass_counts_twice_and_a_group_reads_its_prompt_once():
    config = tiny()
    train = dataclasses.replace(CASE, kind="train", new=0)
    assert case_flops(config, train) == 3 * 4 * forward_flops(config, 0, 8)
    grpo = dataclasses.replace(CASE, kind="grpo", group=4)
    assert case_flops(config, grpo) == 5 * (forward_flops(config, 0, 8) + 4 * forward_flops(config, 8, 10))


LLAMA = DenseShape("llama", 50, 12, 20, 3, 6, 2, 64, 10000.0, True)  # heads of 2


def test_a_dense_model_by_hand():
    assert (
        weights_per_token(LLAMA)
        == all_weights(LLAMA)
        == 3 * (2 * 12 * 12 + 2 * 12 * 4 + 3 * 12 * 20) + 12 * 50
    )
    assert forward_flops(LLAMA, 2, 4) == 2 * 2 * weights_per_token(LLAMA) + 2 * 3 * 6 * (2 + 2) * (3 + 4)


def test_an_update_passes_four_times_over_prompts_once_and_completions_of_their_own_lengths():
    case = dataclasses.replace(CASE, kind="update", group=2, new=9)
    assert lengths(4, 9) == [len(tokens) for tokens in completions(4, 9, 50)]
    assert case.tokens == sum(lengths(4, 9)) and len(set(lengths(4, 9))) > 1
    rows_ = [forward_flops(LLAMA, 8, 8 + n) for n in lengths(4, 9)]
    assert case_flops(LLAMA, case) == 4 * (2 * forward_flops(LLAMA, 0, 8) + sum(rows_))


def test_the_roofline_is_the_later_of_operations_and_bytes():
    assert case_bytes(LLAMA, CASE, "bf16") == 2 * (2 * all_weights(LLAMA) + 4 * (9 + 10) * 3 * 8)
    flops, moved = case_flops(LLAMA, CASE), case_bytes(LLAMA, CASE, "fp32")
    assert roofline(LLAMA, CASE, "fp32", peak=1.0, bandwidth=1e12) == flops
    assert roofline(LLAMA, CASE, "fp32", peak=1e12, bandwidth=1.0) == moved


def test_beside_busy_processes_each_is_compared_with_itself_idle():
    case = dataclasses.replace(CASE, busy=True, floors={}, goals={})
    ours = dataclasses.replace(result("ours", 2.0), case=case, idle=1.0)
    for idle, said in ((1.0, "no more than theirs"), (2.5, "MORE THAN THEIRS")):
        peer = dataclasses.replace(result("transformers", 3.0), case=case, idle=idle)
        assert judged([ours, peer], {"fp32": 1e9}, {})[1].judgement.endswith(said)


def test_steps_whose_gradients_differ_are_told():
    ours = dataclasses.replace(result("ours", 1.0), facts={"gradient norm": 2.0})
    for norm, said in ((2.001, "0.05% apart"), (2.1, "4.76% apart, MORE THAN 0.1%")):
        peer = dataclasses.replace(result("transformers", 1.0), facts={"gradient norm": norm})
        assert judged([ours, peer], {"fp32": 1e9}, {})[1].judgement.endswith(said)


def test_utilisation_and_speedup():
    assert utilisation(flops=3e12, seconds=2.0, peak=6e12) == 0.25
    assert speedup(ours=2.0, theirs=10.0) == 5.0


@pytest.mark.parametrize(
    "theirs, said",
    [(4.9, "floor 5 MISSED"), (5.0, "floor 5 reached"), (8.0, "goal 8 reached")],
)
def test_a_ratio_is_judged_by_floor_and_goal(theirs, said):
    ours, peer = judged([result("transformers", theirs), result("ours", 1.0)], {"fp32": 1e9}, {})
    assert (ours.result.contestant, ours.ratio, ours.judgement) == ("ours", None, "")
    assert (peer.ratio, peer.judgement) == (theirs, said)
    assert ours.tokens_per_s == 8.0  # sampled tokens, not the prompt's
    expected = case_flops(load_model("laptop"), CASE) / 1e9
    assert ours.share_of_peak == pytest.approx(expected)


def test_more_memory_than_a_peer_is_said():
    results = [result("ours", 1.0, 2 * MIB), result("transformers", 9.0, MIB)]
    assert judged(results, {"fp32": 1e9}, {})[1].judgement == "goal 8 reached, ours takes more memory"


def test_each_contestant_is_measured_by_the_peak_of_its_own_dtype():
    results = [result("ours", 1.0, setting=BF16), result("transformers", 1.0)]
    ours, peer = judged(results, {"fp32": 1e9, "bf16": 4e9}, {"bf16": 8e9})
    assert peer.share_of_peak == pytest.approx(4 * ours.share_of_peak)
    assert ours.share_of_sheet == ours.share_of_peak / 2 and peer.share_of_sheet is None


def test_data_sheets_are_of_the_gpus_that_they_name():
    assert data_sheet("NVIDIA H200") == {"bf16": 989.4e12}
    assert data_sheet("NVIDIA H200 NVL") == {}


def test_the_table_has_a_line_for_each_contestant():
    rows_ = judged([result("ours", 1.0), result("transformers", 8.0)], {"fp32": 1e9}, {})
    table = table_of(rows_, 2, {"fp32": 1e9}, 1e9)
    assert table.row_count == 2
    assert list(table.columns[2].cells) == ["ours", "transformers"]
    assert list(table.columns[10].cells) == ["", "8.0"]


def test_prompts_are_the_same_each_time_and_end_nowhere():
    assert rows(3, 50, 20) == rows(3, 50, 20)
    assert min(min(row) for row in rows(3, 50, 20)) > EOS


FAKE = """
import json, sys, threading
from bench.turns import Turns

turns = Turns()
dtype = json.load(open(sys.argv[1]))["setting"]["dtype"]
print("a library's chatter")
if dtype == "broken":
    sys.exit("no such kernel")
turns.warm()
while turns.begin():
    turns.say(seconds=2.0 if dtype == "slow" else 1.0)
turns.finish(memory=123)
"""
ENDLESS = """
import os, sys
from pathlib import Path
from bench.turns import Turns

turns = Turns()
if {in_a_turn}:
    turns.warm()
    turns.begin()
Path("worker.pid.partial").write_text(str(os.getpid()))
os.rename("worker.pid.partial", "worker.pid")
while True:
    pass
"""


def fake_python(folder: Path, script: str) -> str:
    """A python that runs the script whatever module it is asked for."""
    path, python = folder / "fake.py", folder / "python"
    path.write_text(script)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {path} "$3"\n')
    python.chmod(0o755)
    return str(python)


def fake_job(contestant: str, dtype: str) -> Job:
    return Job(contestant, CASE, "laptop", 300, "", Setting(dtype, {}), "cpu", 1)


@pytest.fixture
def pythons(tmp_path):
    python = fake_python(tmp_path, FAKE)
    return {"ours": python, "transformers": python}


def test_contestants_take_turns_and_report_time_and_memory(pythons, tmp_path):
    jobs = [fake_job("ours", "quick"), fake_job("transformers", "slow")]
    ours, peer = contest(jobs, 2, tmp_path, pythons)
    assert (ours.contestant, ours.memory, ours.model) == ("ours", 123, "laptop")
    assert (ours.seconds, peer.seconds) == (1.0, 2.0)


def test_the_fastest_setting_is_found_and_one_that_fails_is_passed_over(pythons, tmp_path):
    jobs = [fake_job("ours", dtype) for dtype in ("slow", "broken", "quick")]
    chosen, times = fastest(jobs, tmp_path, pythons)
    assert chosen.dtype == "quick"
    assert str(times["broken"]) == "ours (broken) stopped: no such kernel"
    with pytest.raises(EnvironmentProblem, match="no such kernel"):
        fastest([fake_job("ours", "broken")], tmp_path, pythons)


@pytest.mark.parametrize("in_a_turn", [False, True])
def test_a_worker_dies_with_its_referee(in_a_turn, tmp_path):
    python = fake_python(tmp_path, ENDLESS.format(in_a_turn=in_a_turn))
    code = "from test_bench import *; contest([fake_job('ours', 'fp32')], 1, Path(), {'ours': sys.argv[1]})"
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    referee = subprocess.Popen([sys.executable, "-c", code, python], cwd=tmp_path, env=environment)
    pid_file = tmp_path / "worker.pid"
    wait_until(lambda: pid_file.exists() or referee.poll() is not None, "the worker's start")
    worker = psutil.Process(int(pid_file.read_text()))
    referee.kill()
    referee.wait()
    try:
        worker.wait(timeout=LIMIT_S)
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.parametrize("name", ["cpu", "gpu", "tiny"])
def test_shipped_benches_load_and_their_models_exist(name):
    config = load_bench(name)
    for case in config.cases:
        assert all(
            config.settings_of(name, case.kind, model)
            for name in ["ours", *case.peers]
            for model in case.models
        )
        assert [config.shape(model).name for model in case.models] == case.models


def test_settings_may_be_of_one_kind_of_case():
    config = rehearsal(load_bench("gpu"))
    train, sample = config.cases
    assert (train.sequences, train.prompt, train.new, sample.new) == (2, 8, 0, 3)
    options = [
        {name for setting in config.settings_of("ours", case.kind) for name in setting.options}
        for case in config.cases
    ]
    assert options == [{"attention", "compile", "recompute"}, {"graphs"}]
    assert config.settings_of("transformers", "train") == config.settings_of("transformers", "sample")


def test_a_setting_that_a_contestant_would_ignore_is_refused(monkeypatch):
    from bench import config

    content = config.read("bench/tiny")
    settings = {"ours": [{"dtype": "fp32", "options": {"experts": "eager"}}]}
    monkeypatch.setattr(config, "read", lambda name: {**content, "settings": settings})
    with pytest.raises(ConfigError, match="experts=eager is no setting of ours"):
        load_bench("tiny")


def test_without_a_gpu_the_gpu_bench_is_one_line(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    said = capsys.readouterr()
    assert said.err == "bench: needs a CUDA GPU and a CUDA build of torch; there is none here\n"
    assert said.out == ""


@pytest.mark.slow
def test_a_tiny_bench_from_end_to_end(capsys):
    assert main(["tiny", "--vllm-python", "nowhere"]) == 0
    said = capsys.readouterr().out
    assert "transformers" in said and "tokens/s" in said and "training 2 x 8" in said


@pytest.mark.parametrize("arguments", [["cpus"], ["tiny", "--model", "laptops"]])
def test_a_wrong_name_is_one_line_with_the_right_one(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("bench: conf/") and "did you mean" in error
