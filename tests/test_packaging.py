"""The wheel, the pins, what make says on a machine that lacks something, and the sizes of the house."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from r1pipe.cli.bundle import bundle
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
SOURCES = sorted(
    path for folder in ("r1pipe", "stages", "tests/bench") for path in ROOT.glob(f"{folder}/**/*.py")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this checkout, built without network."""
    copy, out = tmp_path_factory.mktemp("checkout") / "r1pipe", tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda folder, names: (
            NOT_COPIED(folder, names) | ({"runs"} if Path(folder) == ROOT else set())
        ),
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        copy,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("r1pipe-*.whl"))


def test_wheel_holds_package_conf_stages_and_data(wheel):
    held = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.partition("/")[0].endswith(".dist-info")
    }
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "r1pipe/**/*.py",
            "r1pipe/model/kernels/cpu/*",
            "r1pipe/**/templates/*",
            "r1pipe/**/*.yaml",
        )
        for path in ROOT.glob(pattern)
    }
    bundled = {
        f"r1pipe/_bundled/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("conf/**/*.yaml", "stages/*.py", "data/**/*")
        for path in ROOT.glob(pattern)
        if path.is_file() and path.parent != ROOT / "conf" / "bench"
    }
    assert {name for name in bundled if "/conf/" in name}
    assert held == package | bundled


def test_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    code = (
        "import sys, r1pipe.cli.commands; print(r1pipe.__file__, file=sys.stderr); r1pipe.cli.commands.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "stage=grpo"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(site))
    assert "group_size" in done.stdout
    assert list(empty.iterdir()) == []


def test_every_package_is_listed_in_pyproject():
    listed = {name for name in PYPROJECT["tool"]["setuptools"]["packages"] if "_bundled" not in name}
    assert listed == set(find_packages(str(ROOT), include=["r1pipe", "r1pipe.*"]))


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    exact = dict(name.split("==") for name in wanted if "==" in name)
    assert [name for name in wanted if name.partition("==")[0] not in pins] == []
    assert {name: pins[name] for name in exact} == exact
    assert pins["torch"] == "2.13.0"


def test_license_is_apache():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def make(*arguments, path=None, **environment):
    if path is None:
        path = os.environ["PATH"]
    return subprocess.run(
        [shutil.which("make"), "--no-print-directory", "-C", ROOT, *arguments],
        env=os.environ | {"PATH": path, "MAKEFLAGS": ""} | environment,
        capture_output=True,
        text=True,
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="GNU make is not installed")


@needs_make
def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert {
        line.split()[1] for line in make("help").stdout.splitlines() if line.startswith("  make ")
    } == targets
    assert targets >= {"install", "reproduce", "test", "smoke", "pretrain", "ui", "help"}


@needs_make
def test_make_help_needs_no_sed(tmp_path):
    """BSD's sed knows no tabs in what it puts in; awk is the same everywhere."""
    for name in ("bash", "awk"):
        (tmp_path / name).symlink_to(shutil.which(name))
    assert make("help", path=str(tmp_path)).stdout == make("help").stdout != ""


@pytest.fixture
def tools(tmp_path):
    """A folder with the few programs that `make install` needs, and no compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "awk", "df", "grep", "tee", "cat", "touch", "test"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@needs_make
def test_install_without_compiler_is_one_line(tools, tmp_path):
    done = make("install", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", path=str(tools), CXX="")
    assert done.returncode != 0
    assert done.stdout == "install: needs a C++ compiler (g++ or clang++); on Debian: apt install g++\n"


@needs_make
def test_install_with_an_old_python_is_one_line(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert (
        done.stdout == f"install: {old} is not Python 3.11 or newer; make PYTHON=/path/to/a/newer/python3\n"
    )


@needs_make
def test_install_on_a_full_disk_is_one_line(tmp_path):
    done = make("install", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", "NEED_GB=999999")
    assert done.returncode != 0
    assert done.stdout.startswith("install: needs 999999 GB of free disk here")
    assert len(done.stdout.splitlines()) == 1


def fake_venv(folder, script):
    """A .venv whose python only answers to pip."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


@needs_make
@pytest.mark.parametrize(
    "said, told",
    [
        ("WARNING: Retrying after connection broken by NewConnectionError", "cannot reach its package index"),
        (
            "ERROR: Could not find a version that satisfies torch (from versions: none)",
            "cannot reach its package",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: ResolutionImpossible", "ResolutionImpossible"),
    ],
)
def test_install_that_fails_in_pip_is_one_line(tmp_path, said, told):
    venv = fake_venv(tmp_path / "venv", f"echo '{said}' >&2; exit 1")
    done = make("install", f"PYTHON={sys.executable}", f"VENV={venv}")
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("install: ") and told in last
    assert not (venv / ".installed").exists()


@needs_make
def test_a_second_install_does_nothing(tmp_path):
    venv = fake_venv(tmp_path / "venv", 'echo "$@" >> "$(dirname "$0")/calls"')
    for _ in range(2):
        done = make("install", f"PYTHON={sys.executable}", f"VENV={venv}")
        assert done.returncode == 0, done.stderr
    calls = (venv / "bin" / "calls").read_text().splitlines()
    assert len(calls) == 2  # torch, then the rest, once
    assert "torch==2.13.0" in calls[0] and all("-c constraints.txt" in call for call in calls)


def test_the_bundled_base_is_the_published_part_of_a_checkpoint(tmp_path):
    run, base = RunFolder(tmp_path / "pretrain-s0-1"), tmp_path / "base"
    target = run.checkpoint(2)
    fresh = checkpoints.begin(target)
    (fresh / "engine").mkdir()
    for name in ("model.safetensors", "config.json", "engine/state.pt"):
        (fresh / name).write_text(name)
    checkpoints.finish(target)
    known = checkpoints.manifest_hash(target)
    rows = [{"step": i, "train/loss": 1.0} | ({"eval/greedy": 0.5} if i == 1201 else {}) for i in range(3000)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"stage": "pretrain", "pipeline": "mine", "created": "2026-01-01T10:00:00"}
    record |= {"checkpoint": "checkpoints/step-2", "checkpoint_hash": known}
    run.record.write_text(json.dumps(record))
    bundle(run, base)
    expected = ["config.json", "curve.jsonl", "manifest.json", "model.safetensors", "record.json"]
    assert sorted(path.name for path in base.iterdir()) == expected
    checkpoints.verify(base, known)
    steps = [json.loads(line)["step"] for line in (base / "curve.jsonl").read_text().splitlines()]
    assert 1201 in steps and len(steps) == 601
    (target / "config.json").write_text("changed")
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        bundle(run, base)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    functions = (
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [n.name for n in functions if n.end_lineno - n.lineno >= 80] == []
