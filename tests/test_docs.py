"""README and docs/ cannot drift: commands compose, help texts are real, generated pages are current."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_hf_config import publish
from typer.testing import CliRunner

from r1pipe.cli.commands import app
from r1pipe.config.compose import compose
from r1pipe.core.paths import content_dir

HOME = Path(__file__).resolve().parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    if page.name not in ("lab-notes.md", "reference.md")  # a diary of its day; generated
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("r1pipe ", "make "))]
WITHOUT_OVERRIDES = {
    "--help",
    "data",
    "ui",
    "report",
    "provenance",
    "audit",
    "chat",
    "generate",
    "serve",  # has keys of its own, which test_serve.py reads
    "lineage",
    "sync",
    "samples",
    "export",
    "score",
    "import",
    "prune",
    "compare",
    "eval",
    "judge",  # takes a model first; test_generative_judges.py composes what the guide shows
    "plan",  # has keys of its own; test_plan.py runs what the guide shows
    "cost",
}


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    makefile = (HOME / "Makefile").read_text()
    assert all(
        re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words_of(command) if "=" not in target
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("r1pipe ")])
def test_r1pipe_commands_are_known_and_compose(command, tmp_path):
    name, *rest = words_of(command)
    if any(word.startswith("model.path=") for word in rest):  # whose folder is read
        path = publish(tmp_path / "model")
        rest = [f"model.path={path}" if word.startswith("model.path=") else word for word in rest]
    if "engine.sampler=vllm" in rest:  # whose environment must exist
        rest.append(f"sampler.python={sys.executable}")
    if name not in WITHOUT_OVERRIDES:
        words = [word for word in rest if not word.startswith("--")]
        compose([word.partition(",")[0] for word in words] if "--multirun" in rest else words)
    known = CliRunner().invoke(app, [name, "--help"] if not name.startswith("-") else [name])
    assert known.exit_code == 0, known.output
    assert all(word.split("=")[0] in known.output for word in rest if word.startswith("--"))


def test_python_in_the_readme_runs(capsys):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code.replace('"out/"', repr(str(content_dir() / "base"))), {})
    assert capsys.readouterr().out.strip()


def test_help_in_the_readme_is_the_real_one():
    shown = re.search(r"```text\n(Usage: r1pipe .*?)```", README, re.DOTALL)
    assert shown, "the README shows r1pipe --help"
    real = (
        CliRunner()
        .invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}, prog_name="r1pipe")
        .output
    )
    assert shown[1].split() == real.split()


def test_the_map_of_folders_is_true():
    rows = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    assert len(rows) > 10
    assert not [row for row in rows if not (HOME / row).exists()]
    packages = {f"r1pipe/{p.parent.name}/" for p in (HOME / "r1pipe").glob("*/__init__.py")}
    assert not packages - set(rows), "a package that the map leaves out"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_a_stranger_reads_the_readme_in_five_minutes():
    assert len(README.splitlines()) <= 250


def test_generated_pages_are_current():
    """After a change of packages, commands or config keys: `make docs`."""
    spec = importlib.util.spec_from_file_location("build_docs", HOME / "docs" / "build.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for name, generated in build.generated().items():
        page = (HOME / "docs" / name).read_text(encoding="utf-8")
        assert build.with_generated(page, generated) == page, f"docs/{name} is out of date: run `make docs`"
    drawn = (HOME / "docs" / "packages.svg").read_text(encoding="utf-8")
    for package in build.packages():
        assert f">{package.name}<" in drawn, f"docs/packages.svg lacks {package.name}: run `make docs`"


def test_the_files_that_the_architecture_names_exist():
    page = (HOME / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page))
    assert len(named) > 20
    assert not [name for name in named if not any((HOME / top / name).exists() for top in (".", "r1pipe"))]
