"""A Slurm whose machines are namespaces (hosts.network): slurmctld on the first, slurmd on the others."""

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from hosts.network import HEAD, Network, wait_until

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge", "sbatch": "slurm-client"}
CONF = """
ClusterName=hosts
SlurmctldHost={head}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
SlurmdTimeout=30
KillWait=10
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
SlurmctldParameters=preempt_send_user_signal
NodeName={nodes} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=300 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; "" if there can."""
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    absent = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool, path=path)})
    return f"not installed: {' '.join(absent)} (apt install {' '.join(absent)})" if absent else ""


class Slurm:
    def __init__(self, network: Network, folder: Path):
        self.network, self.folder = network, folder
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        nodes = [name for name in network.hosts if name != HEAD]
        conf = CONF.format(folder=folder, head=HEAD, nodes=",".join(nodes))
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self.begin(HEAD, "slurmctld")
        for name in nodes:
            self.begin(name, "slurmd")
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"], "idle nodes")

    def begin(self, name: str, daemon: str) -> None:
        host, munge = self.network.hosts[name], self.folder / f"munge-{name}"
        munge.mkdir()
        munge.chmod(0o755)
        words = ["--force", f"--key-file={self.folder / 'munge.key'}", f"--log-file={munge / 'log'}"]
        words += [f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}"]
        host.do("install", "-d", "-m", "755", "/run/munge")
        host.do("mount", "-t", "tmpfs", "none", "/sys/fs/cgroup")
        self._run(host.inside("munged", *words))
        self._run(host.inside(daemon))

    def _run(self, line: list[str]) -> str:
        done = subprocess.run(
            line, env=self.variables(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, *words: str) -> str:
        """What a command on the first host prints."""
        return self._run(self.network.hosts[HEAD].inside(*words))

    def variables(self) -> dict[str, str]:
        around = self.network.variables()
        return around | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{around['PATH']}:{PATH}"}
