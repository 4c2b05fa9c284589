"""Which rank a process is under each launcher, and what ends it when it waits for others."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import codes, ranks
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import command as launch
from r1pipe.runs import locks
from r1pipe.train.engine import state as engine_state
from r1pipe.train.engine.discovery import Place, discover, first_host
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.run import open_run


def of(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


AT = ("node1", 29501)
MEET = of("MASTER_ADDR=node1 MASTER_PORT=29501")
# For one rank, what each launcher sets (DeepSpeed 0.19.8 and torch 2.13 by their sources, the others by their
# manuals).
DEEPSPEED = of("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 CROSS_RANK=1 CROSS_SIZE=2 LOCAL_SIZE=2") | MEET
TORCHRUN = of("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2") | MEET
OPENMPI = of("OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 PMIX_RANK=3") | MEET
MPICH = of("PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2") | MEET
TASK = of("SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4")
SRUN = TASK | of("SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=gpu[03-04]")
A_NODE = SRUN | of("SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2")  # one task for each
BATCH = of("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_JOB_ID=7")  # the shell of sbatch


@pytest.mark.parametrize(
    "variables",
    [
        DEEPSPEED,
        TORCHRUN,
        OPENMPI,
        MPICH,
        SRUN | MEET,
        MPICH | of("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1"),  # DeepSpeed's mpich launcher
        SRUN | MEET | of("PMI_RANK=3 PMI_SIZE=4"),  # srun --mpi=pmi2
        SRUN | MEET | of("PMIX_RANK=3"),
        BATCH | DEEPSPEED,  # in a job's script
        BATCH | OPENMPI,
        of("SLURM_NTASKS=8") | DEEPSPEED,  # in the shell of salloc
        A_NODE | TORCHRUN,
        A_NODE | OPENMPI,
        of("SLURM_PROCID=0 SLURM_NTASKS=1 RANK=3 WORLD_SIZE=4 LOCAL_RANK=1") | MEET,
    ],
    ids=str,
)
def test_a_rank_knows_its_place_under_every_launcher(variables: dict[str, str]) -> None:
    assert discover(variables) == Place(3, 4, 1, AT)


def test_a_process_without_a_launcher_is_alone() -> None:
    for variables in (
        {},
        MEET,
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    ):
        assert discover(variables) == Place(0, 1, 0, None)


def test_srun_gives_a_place_to_meet() -> None:
    place = discover(SRUN)
    assert place.master is not None and place.master[0] == "gpu03"
    assert place.master == discover(SRUN | of("SLURM_PROCID=0 SLURM_LOCALID=0")).master
    assert place.master != discover(SRUN | of("SLURM_JOB_ID=8")).master, "another job's port"
    assert discover(SRUN | of("MASTER_PORT=5")).master == ("gpu03", 5)
    hosts = {"a": "a", "a,b[1-2]": "a", "gpu[3,7]": "gpu3", "r[01-02]-ib,x": "r01-ib", "": ""}
    assert {text: first_host(text) for text in hosts} == hosts


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (of("SLURM_NTASKS=2"), "SLURM_NTASKS=2, but SLURM_PROCID is not set"),
        (of("WORLD_SIZE=2") | MEET, "WORLD_SIZE=2, but RANK is not set"),
        (of("OMPI_COMM_WORLD_SIZE=2"), "OMPI_COMM_WORLD_SIZE=2, but OMPI_COMM_WORLD_RANK is not set"),
        (of("PMIX_RANK=0"), "PMIX_RANK is set without a number of ranks"),
        (of("RANK=1"), "RANK=1 without WORLD_SIZE"),
        (of("SLURM_PROCID=1 SLURM_LOCALID=0"), "SLURM_PROCID=1 without SLURM_STEP_NUM_TASKS"),
        (DEEPSPEED | of("RANK=4"), "RANK=4 is not below WORLD_SIZE=4"),
        (SRUN | of("SLURM_PROCID=4"), "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        (DEEPSPEED | of("RANK=-1"), "RANK='-1' is no whole number"),
        (SRUN | of("SLURM_PROCID=two"), "SLURM_PROCID='two' is no whole number"),
        (of("RANK=1 WORLD_SIZE=2") | MEET, "RANK=1 of 2 without LOCAL_RANK"),
        (DEEPSPEED | of("LOCAL_RANK=4"), "LOCAL_RANK=4 is above RANK=3"),
        (SRUN | of("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1"), "RANK=1 says rank 1 of 4, but SLURM_PROCID=3"),
        (SRUN | of("RANK=0 WORLD_SIZE=1"), "RANK=0 says rank 0 of 1, but SLURM_PROCID=3 rank 3 of 4"),
        (MPICH | of("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1"), "rank 3 of 8, but PMI_RANK=3 rank 3 of 4"),
        (SRUN | of("PMI_RANK=2 PMI_SIZE=4"), "rank 2 of 4, but SLURM_PROCID=3"),
        (BATCH, "MASTER_ADDR, the host of rank 0, is not set; start with srun"),
        (OPENMPI | of("MASTER_ADDR="), "mpirun -x MASTER_ADDR=HOST"),
        (of("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a"), "without MASTER_PORT"),
        (DEEPSPEED | of("MASTER_PORT=70000"), "MASTER_PORT=70000 is no port"),
        (SRUN | TORCHRUN | of("GROUP_WORLD_SIZE=1"), "each of the 4 tasks of srun has started a launcher"),
    ],
)
def test_what_is_missing_or_wrong_is_refused_in_one_line(variables: dict[str, str], told: str) -> None:
    with pytest.raises(EnvironmentProblem) as problem:
        discover(variables)
    assert told in str(problem.value) and "\n" not in str(problem.value)


def test_a_job_without_a_place_ends_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "pretrain-s0", tiny("pretrain"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # which an engine of an earlier test has set
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(SystemExit) as left, open_run(run):
        pytest.fail("it has begun")
    assert left.value.code == 2 and [path.name for path in run.iterdir()] == ["config.json"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("this process's place among its job's ranks is unclear: SLURM_NTASKS=2, but ")


def test_tasks_of_srun_may_each_run_a_job_of_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SRUN | of("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 CROSS_RANK=0 CROSS_SIZE=1") | MEET
    with pytest.raises(EnvironmentProblem, match="each of the 4 tasks"):
        discover(own)
    config = tiny("pretrain")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    line = launch.command(config, RunFolder(tmp_path / "run"))
    with launch.job_environment(config, line, "4711") as variables:
        assert discover(variables) == Place() and variables["SLURM_JOB_ID"] == "7"
        assert variables[locks.LAUNCH] == "4711"


LIMIT_S, LATE_S = 1.0, 1.8  # of a collective of training; of the second rank


def second_is_late(folder: Path) -> None:
    """One of two ranks: what of it went well is in a file; the second is late wherever one may be."""

    def late(what: str) -> None:
        done.append(what)
        if rank == 1:
            time.sleep(LATE_S)

    rank, done = discover().rank, list[str]()
    config = replace(engine_config(2, 3), collective_limit_s=LIMIT_S, control_limit_s=600.0)
    late("start")
    both = Ranks(config)
    late("agree")
    assert both.agree_max(rank) == 1
    late("objects")
    assert both.all_gather_objects(rank) == [0, 1]
    late("sums")
    assert both.sum_over_ranks([rank]) == [1]
    late("barrier")
    both.barrier()
    late("engine")
    engine = Engine(tiny_model(), OPTIM, ROUTER, config, total_steps=1)
    late("gather")
    with engine.gathered():
        late("export")
    written, save = [], torch.save

    def save_late(*arguments: object) -> None:
        written.append(save(*arguments))
        late("write")

    engine_state.torch.save = save_late  # type: ignore[attr-defined]
    engine.save(folder / "state", {"step": 1})
    engine_state.torch.save = save  # type: ignore[attr-defined]
    late("load")
    assert engine.load(folder / "state") == {"step": 1} and written
    assert both.sum_over_ranks([1.0], training=True) == [2]
    late("training")
    try:
        both.sum_over_ranks([1.0], training=True)
    except RuntimeError as error:
        done.append(f"limit: {error}")
    (folder / f"done-{rank}.json").write_text(json.dumps(done))
    exit_immediately_with(0)


def test_a_late_rank_ends_nothing_but_what_training_waits_for(tmp_path: Path) -> None:
    with ranks(tmp_path, second_is_late, 2) as started:
        assert codes(started) == [0, 0], (tmp_path / "out-0.txt").read_text()[-3000:]
    for rank in range(2):
        *went_well, last = json.loads((tmp_path / f"done-{rank}.json").read_text())
        assert [went_well[0], went_well[-1]] == ["start", "training"]
        assert last.startswith("limit: "), "a collective of training has a limit of its own"
