"""Jobs over real hosts, which are namespaces of this machine (tests/hosts): `make hosts` shows a table."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import network, scheduler, slurm_trials, trials
from hosts.trials import Outcome

pytestmark = pytest.mark.slow


def check(outcomes: Iterator[Outcome]) -> None:
    rows = list(outcomes)
    assert rows and all(row.held for row in rows), "\n".join(f"{row.trial}: {row.told}" for row in rows)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[network.Network]:
    if reason := network.missing():
        pytest.skip(reason)
    package = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{package}:{os.environ.get('PYTHONPATH', '')}")
    with network.network(tmp_path / "network", "h1", "h2") as made:
        yield made


def test_a_run_over_hosts_survives_the_loss_of_each(hosts: network.Network, tmp_path: Path) -> None:
    check(trials.run(hosts, tmp_path))


def test_a_run_under_slurm_goes_on_whatever_ends_it(hosts: network.Network, tmp_path: Path) -> None:
    if reason := scheduler.missing():
        pytest.skip(reason)
    check(slurm_trials.run(hosts, scheduler.Slurm(hosts, tmp_path / "slurm"), tmp_path))
