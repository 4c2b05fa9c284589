"""Fixtures that several test files use."""

from pathlib import Path

import pytest
from fakes import House, build_house


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """The command line with stages that do not train; see fakes.py."""
    return build_house(tmp_path, monkeypatch)
