"""Saving beside training: the same files as without, and a failure is told. Each rank hashes and checks its
own part."""

import errno
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from faults.lab import Lab, Shape
from faults.same import both
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run
from safetensors.torch import load_file
from test_engine import batch, loss_of

from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.writing import Writer
from r1pipe.train.run import open_run

BESIDE = "engine.async_save=true"


def engine(level: int = 0, precision: str = "fp32") -> Engine:
    return Engine(tiny_model(), OPTIM, ROUTER, engine_config(1, level, precision), 10)


def step(made: Engine) -> float:
    return made.train_step([partial(loss_of, made.module, batch())]).loss


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("level", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_copy_is_written_to_the_same_bytes_after_the_next_step(
    tmp_path: Path, level: int, precision: str
) -> None:
    made = engine(level, precision)
    step(made)
    made.save(tmp_path / "now", {"step": 1})
    writer = Writer(tmp_path / "later", later=True)
    made.save(tmp_path / "later", {"step": 1}, writer)
    writer.all_copied()
    before = contents(tmp_path / "later")
    step(made)
    assert before.keys() == {"layout.json"}, "nothing else is written before"
    writer.write_copies()
    assert contents(tmp_path / "later") == contents(tmp_path / "now")
    assert {path.name for path in writer.paths} == {path.name for path in (tmp_path / "now").rglob("*.pt")}


def test_tensors_that_share_memory_are_copied_once_and_share_it_again() -> None:
    flat = torch.arange(6.0)
    writer = Writer(Path("unused"), later=True)
    row, whole, again = writer.copy([flat.view(2, 3)[1], flat, {"weights": (flat,)}])
    flat.zero_()
    assert row.tolist() == [3, 4, 5] and whole.tolist() == [0, 1, 2, 3, 4, 5]
    assert again["weights"][0] is whole
    whole[4] = 9
    assert row.tolist() == [3, 9, 5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny("pretrain", BESIDE))


def test_training_goes_on_while_a_copy_is_written_and_the_next_save_waits(folder: Path, monkeypatch) -> None:
    made, go_on, real = engine(), threading.Event(), Writer.write_copies
    monkeypatch.setattr(Writer, "write_copies", lambda writer: (go_on.wait(1800), real(writer))[1])
    with open_run(folder) as run:
        step(made)
        weights = {name: tensor.clone() for name, tensor in made.tensors()}
        run.log(1, {"train/loss": 1.0})
        target = run.save_checkpoint(made, 1, {"cursor": 1})
        lost = step(made)
        run.check_saved(made)
        unfinished = checkpoints.unfinished(target)
        assert not target.exists() and not [*unfinished.rglob("*.pt"), *unfinished.rglob("*.safetensors")]
        threading.Timer(0.2, go_on.set).start()
        run.log(2, {"train/loss": 2.0})
        run.save_checkpoint(made, 2, {"cursor": 2})
        assert target.exists()
    assert checkpoints.steps(folder / "checkpoints") == [1, 2]
    checkpoints.verify(target, engine=True)
    saved = load_file(target / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    with open_run(folder) as run:
        again = engine()
        again.load(target / checkpoints.ENGINE)
        assert step(again) == lost


def test_a_disk_that_is_full_while_a_copy_is_written_is_told_at_the_next_step(
    folder: Path, monkeypatch
) -> None:
    made = engine()

    def full(content: object, file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.save_checkpoint(made, 1, {})
        run.saved()
        monkeypatch.setattr(torch, "save", full)
        run.save_checkpoint(made, 2, {})
        wait_until_written(run)
        run.check_saved(made)
    told = (folder / "error.txt").read_text()
    assert left.value.code == 2 and told.count("\n") == 1 and "is full" in told and "step-2" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]


def wait_until_written(run) -> None:
    run.saving._running.exception(1800)


def test_every_file_is_checked_by_one_rank_and_a_shard_by_its_own() -> None:
    state = [f"engine/state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)]
    names = [*state, "engine/state/mp_rank_00_model_states.pt", "config.json", "model.safetensors"]
    for ranks in (1, 2, 3, 4, 8):
        shares = [checkpoints.share(names, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(names)
        for rank, name in enumerate(state):
            assert name in shares[rank % ranks]
    assert "model.safetensors" not in checkpoints.share(names, 0, 4), "where the shared state is"


@pytest.mark.slow
def test_two_ranks_save_the_same_beside_training_and_each_seals_its_own(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    shapes = [Shape("pretrain", 2, 3), Shape("pretrain", 2, 3, (BESIDE,))]
    plain, beside = (lab.reference(shape) for shape in shapes)
    assert [line for line in both(plain.folder, beside.folder) if "async_save" not in line] == []
    times = [calls["hashed by a rank"] for calls in beside.calls]
    assert times[0] == times[1] == len(checkpoints.steps(RunFolder(beside.folder).checkpoints))
