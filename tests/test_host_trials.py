"""Jobs over real hosts, which are namespaces of this machine (tests/hosts): `make hosts` shows a table."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hosts import network, scheduler, slurm_trials, trials
from hosts.trials import Outcome

BEGUN = """
import sys, time
from pathlib import Path
from hosts.network import Network
print(*(host.pid for host in Network(Path(sys.argv[1]), ["h3"]).hosts.values()), flush=True)
time.sleep(1000)
"""


def check(outcomes: Iterator[Outcome]) -> None:
    rows = list(outcomes)
    assert rows and all(row.held for row in rows), "\n".join(f"{row.trial}: {row.told}" for row in rows)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[network.Network]:
    if reason := network.missing():
        pytest.skip(reason)
    package = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{package}:{package / 'tests'}:{os.environ.get('PYTHONPATH', '')}")
    with network.network(tmp_path / "network", "h1", "h2") as made:
        yield made


def test_hosts_reach_one_another_and_are_gone_with_their_test(hosts: network.Network, tmp_path: Path) -> None:
    line = hosts.hosts[network.HEAD].inside("pdsh", "-S", "-R", "ssh", "-w", "h1,h2", "hostname")
    done = subprocess.run(line, env=hosts.variables(), capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["h1: h1", "h2: h2"]
    hosts.cut("h2")
    options = ["-F", str(hosts.folder / "ssh_config"), "-o", "ConnectTimeout=2"]
    line = hosts.hosts["h1"].inside("ssh", *options, "h2", "hostname")
    assert subprocess.run(line, check=False, capture_output=True).returncode == 255
    line = [sys.executable, "-c", BEGUN, str(tmp_path / "others")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        first = [psutil.Process(int(pid)) for pid in test.stdout.readline().split()]
        assert len(first) == 2 and all(process.is_running() for process in first)
        test.kill()
    assert not psutil.wait_procs(first, timeout=network.PATIENCE_S)[1]


@pytest.mark.slow
def test_a_run_over_hosts_survives_the_loss_of_each(hosts: network.Network, tmp_path: Path) -> None:
    check(trials.run(hosts, tmp_path))


@pytest.mark.slow
def test_a_run_under_slurm_goes_on_whatever_ends_it(hosts: network.Network, tmp_path: Path) -> None:
    if reason := scheduler.missing():
        pytest.skip(reason)
    check(slurm_trials.run(hosts, scheduler.Slurm(hosts, tmp_path / "slurm"), tmp_path))
