"""Fixtures that several test files use."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import House, build_house

SHARED = Path(os.environ.get("R1PIPE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


LONG = ("test_resume.py", "test_doctor.py", "test_hf_stages.py", "test_stuck.py", "test_signals.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that at the end no worker is alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _outside_the_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of modules and of the session start in an empty folder: no test sees the clone's runs/."""
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets; without it, its tests are skipped, but not where CI runs them."""
    if not SHARED.is_dir():
        message = f"no real data in {SHARED}; set R1PIPE_SHARED_DATA"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return SHARED


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """The command line with stages that do not train; see fakes.py."""
    return build_house(tmp_path, monkeypatch)
