"""The run folder from the job's side: streams, metrics, whole checkpoints, errors, the record."""

import json
import re
import runpy
from dataclasses import replace

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run

from r1pipe.chat.template import Chat
from r1pipe.config import ParentRef, PretrainConfig
from r1pipe.config.script_options import GenerateOptions
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.paths import RunFolder, content_dir, stages_dir
from r1pipe.data.source import check_data_unchanged
from r1pipe.model import load_pretrained
from r1pipe.runs import checkpoints, lineage
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.loading import load_model
from r1pipe.train.run import open_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", tiny("pretrain", "stage.keep=2"))


def test_random_streams_depend_on_seed_name_and_step_alone(folder):
    with open_run(folder) as run:
        torch.manual_seed(1)
        first = run.rng("order", 3).integers(1 << 30, size=4).tolist()
        run.rng("sampling").integers(10)
        assert run.rng("order", 3).integers(1 << 30, size=4).tolist() == first
        assert len({run.seed("order", 3), run.seed("order", 4), run.seed("sampling", 3)}) == 3
        drawn = torch.rand(2, generator=run.generator("order"))
        assert torch.equal(drawn, torch.rand(2, generator=run.generator("order")))


def test_a_users_error_is_one_line_and_exit_code_2(folder):
    with pytest.raises(SystemExit) as left, open_run(folder):
        raise DataError("corpus.json:3 has no column text; add it")
    assert left.value.code == 2
    assert (folder / "error.txt").read_text() == "corpus.json:3 has no column text; add it\n"


def test_a_stage_script_refuses_the_config_of_another(tmp_path):
    folder = write_run(tmp_path / "run", tiny("cold_start"))
    with pytest.raises(SystemExit), open_run(folder, PretrainConfig):
        pass
    assert "is for sft.py" in (folder / "error.txt").read_text()


def test_other_errors_are_not_swallowed(folder):
    with pytest.raises(ZeroDivisionError), open_run(folder):
        _ = 1 / 0
    assert not (folder / "error.txt").exists()


def save(run, engine, step):
    made = run.save_checkpoint(engine, step, {"cursor": step})
    run.saved()
    return made


def test_checkpoints_are_whole_pruned_and_resumed_from(folder):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10)
    with open_run(folder) as run:
        for step in (1, 2, 3):
            run.log(step, {"train/loss": float(step)})
            save(run, engine, step)
        run.log(4, {"train/loss": 4.0})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')  # a line that a kill cut off
    assert checkpoints.steps(folder / "checkpoints") == [2, 3]
    newest = folder / "checkpoints" / "step-3"
    (newest.with_name(".step-9.unfinished")).mkdir()
    checkpoints.verify(newest, checkpoints.manifest_hash(newest), engine=True)
    loaded, chat = load_pretrained(newest), Chat.load(newest)
    assert torch.equal(loaded.lm_head.weight, engine.module.lm_head.weight)
    generation = json.loads((newest / "generation_config.json").read_text())
    assert generation["eos_token_id"] == chat.eos_id != generation["pad_token_id"]
    with open_run(folder) as run:
        assert run.resume(engine) == (3, {"cursor": 3})
        assert not (newest.with_name(".step-9.unfinished")).exists(), (
            "what a kill left goes at the next start"
        )
        save(run, engine, 4)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_a_run_without_a_checkpoint_starts_its_metrics_anew(folder):
    with open_run(folder) as run:
        run.log(1, {"train/loss": 1.0})
        assert run.resume(Ranks(engine_config())) == (0, {})
    assert (folder / "metrics.jsonl").read_text() == ""


def test_a_changed_checkpoint_is_refused_by_file(folder):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10)
    with open_run(folder) as run:
        made = save(run, engine, 1)
        parent = ParentRef("pretrain", "run", str(made), checkpoints.manifest_hash(made))
        assert load_model(run, parent).config.hidden_size == 32
        with (made / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
            load_model(run, parent)
        (made / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
            load_model(run, parent)
        with pytest.raises(CheckpointError, match="no manifest"):
            checkpoints.verify(folder)


def test_another_chat_format_is_refused(folder, tmp_path):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10)
    with open_run(folder) as run:
        made = save(run, engine, 1)
        settings = json.loads((made / "tokenizer_config.json").read_text())
        settings["chat_template"] += " "
        (made / "tokenizer_config.json").write_text(json.dumps(settings))
        run.config.reads_from["grpo"] = ParentRef("grpo", "run", str(made), "")
        with pytest.raises(CheckpointError, match="another tokenizer or chat template"):
            run.load_chat()


def test_a_system_prompt_goes_into_checkpoints_and_from_them_into_later_stages(tmp_path):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10)
    with open_run(write_run(tmp_path / "first", tiny("cold_start", "chat.system=Be brief."))) as run:
        assert run.load_chat().system == "Be brief."
        made = save(run, engine, 1)
    parent = ParentRef("cold_start", "first", str(made), "")
    for words, system in ([], "Be brief."), (["chat.system=Else."], "Else."), (["chat.system="], ""):
        config = replace(tiny("base", *words), weights_from=parent)
        with open_run(write_run(tmp_path / f"run{len(system)}", config)) as run:
            assert run.load_chat().system == system
            run.config.reads_from["grpo"] = replace(parent, checkpoint=str(content_dir() / "tokenizer"))
            if words:
                run.load_chat()
            else:
                with pytest.raises(CheckpointError, match="another tokenizer or chat template"):
                    run.load_chat()


def problems(path, one: int) -> None:
    rows = ({"question": f"What is {i} plus 1?", "answer": f"{i}+1\n#### {i + one}"} for i in range(9))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def from_a_file(tmp_path):
    """A run on data of a file that has begun."""
    problems(tmp_path / "train.jsonl", 1)
    config = tiny("cold_start", "data=gsm8k", f"data.path={tmp_path / 'train.jsonl'}")
    folder = write_run(tmp_path / "run", config)
    with open_run(folder) as run:
        assert run.load_data().hash == json.loads(run.folder.source.read_text())["hash"]
    return folder


def test_a_run_that_has_made_something_does_not_go_on_with_other_data(from_a_file, tmp_path):
    engine, file = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10), tmp_path / "train.jsonl"
    with open_run(from_a_file) as run:
        save(run, engine, 1)
    with open_run(from_a_file) as run:
        run.load_data()  # goes on with the same
    problems(file, 2)
    with pytest.raises(SystemExit) as left, open_run(from_a_file) as run:
        run.load_data()
    told = (from_a_file / "error.txt").read_text()
    assert left.value.code == 2 and told.count("\n") == 1
    assert re.search(rf"\({file}: [0-9a-f]{{12}} -> [0-9a-f]{{12}}\); restore it .* --fresh", told)
    file.unlink()
    (from_a_file / "error.txt").unlink()
    with pytest.raises(SystemExit), open_run(from_a_file) as run:
        run.load_data()
    assert "-> (none)" in (from_a_file / "error.txt").read_text()
    problems(file, 1)
    with open_run(from_a_file) as run:
        run.load_data()  # what it was is back


def test_data_that_is_mended_before_anything_is_made_is_what_the_run_begins_with(from_a_file, tmp_path):
    before = (from_a_file / "data" / "source.json").read_text()
    problems(tmp_path / "train.jsonl", 2)
    with open_run(from_a_file) as run:
        run.load_data()
    assert (from_a_file / "data" / "source.json").read_text() != before


def test_data_that_is_made_is_told_by_its_name():
    before, now = ({"hash": letter * 64, "files": {}} for letter in "ab")
    check_data_unchanged("world", before, before)
    with pytest.raises(DataError, match=r"\(data=world: a{12} -> b{12}\)"):
        check_data_unchanged("world", before, now)


def test_stages_run_as_scripts_from_pretraining_to_an_answer(tmp_path, capsys):
    """pretrain, then the stage that measures its checkpoint, then questions: what others rely on."""
    first = write_run(tmp_path / "first", tiny("pretrain", "stage.max_steps=3", "stage.eval.every=2"))
    script("pretrain.py")["main"](first)
    record = json.loads((first / "record.json").read_text())
    assert record["steps"] == 3 and record["checkpoint"] == "checkpoints/step-3"
    assert {"starting", "update", "evaluating", "saving"} <= record["seconds"].keys()
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert "eval/pass_at_1" in lines[1] and "eval/pass_at_1" not in lines[0]
    evaluation = json.loads((first / "evaluation.json").read_text())
    assert evaluation == record["metrics"] and evaluation["problems"] == 4
    assert len(json.loads((first / "samples.json").read_text())) == 2

    config = tiny("base")
    checkpoint = str(first / record["checkpoint"])
    config.weights_from = ParentRef("pretrain", "first", checkpoint, record["checkpoint_hash"])
    second = write_run(tmp_path / "second", config)
    config.weights_from = None
    script("evaluate.py")["main"](second)
    adopted = json.loads((second / "record.json").read_text())
    assert adopted["parents"]["weights"]["checkpoint"] == checkpoint
    assert adopted["checkpoint_hash"] == record["checkpoint_hash"]
    config = replace(tiny("base", "chat.system=Be brief."), weights_from=adopted_ref(second))
    third = write_run(tmp_path / "third", config)
    script("evaluate.py")["main"](third)
    prompted = json.loads((third / "record.json").read_text())
    assert Chat.load(third / prompted["checkpoint"]).system == "Be brief."
    assert prompted["template_hash"] != adopted["template_hash"]
    assert not any(one.problems for one in lineage.ancestors(adopted_ref(third)) if not one.depth)
    generate = script("generate.py")
    folder = second / adopted["checkpoint"]
    questions = ["1+1?", "2+2?"]
    generate["main"](GenerateOptions(folder, questions, False, True, None, None, max_tokens=3, seed=0))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [answer["question"] for answer in answers] == ["1+1?", "2+2?"]
    assert {answer["finish_reason"] for answer in answers} <= {"stop", "length"}


def adopted_ref(folder) -> ParentRef:
    return lineage.checkpoint_of_run(RunFolder(folder))


def script(name: str) -> dict:
    return runpy.run_path(str(stages_dir() / name))


def test_a_parent_that_does_not_fit_is_refused_by_the_job_too(tmp_path):
    base = lineage.bundled()
    config = replace(tiny("cold_start"), weights_from=base)
    with open_run(write_run(tmp_path / "run", config)) as run:
        with pytest.raises(CheckpointError, match=r"has \w+=\d+, but the config has model\.") as caught:
            load_model(run, base)
        assert "\n" not in str(caught.value)
