"""Hosts as namespaces of one machine: each has a network, a name, processes and mounts of its own, and sshd.

All lie on one bridge, in the namespace of the first, from which commands are given. A host's first process
ends with its standard input, and all of its processes, devices and mounts with it: nothing is left behind,
even by a test that is killed. Needs root and Linux; `missing` says what else.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}  # of Debian
TOOLS |= {"unshare": "util-linux", "nsenter": "util-linux"}
HEAD = "head"  # the host from which commands are given
PREFIX = "10.77.0"
UNSHARE = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
# what a host does first: a name, no file of the machine's /run, names of all hosts, then sshd
FIRST = """
set -e
hostname {name}
mount -t tmpfs none /run && mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
touch {folder}/{name}.up
read -r ready
{sshd} -D -e -f {folder}/sshd_config -o PidFile=none 2>{folder}/{name}.sshd &
touch {folder}/{name}.ready
exec cat >/dev/null
"""
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PrintMotd no
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
PATIENCE_S = 120.0


def missing() -> str:
    """Why there can be no hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "namespaces with a network need root"
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if absent := sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)}):
        return f"not installed: {' '.join(absent)} (apt install {' '.join(absent)})"
    line = [*UNSHARE, "ip", "link", "add", "br0", "type", "bridge"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return f"this machine allows no namespaces: {done.stderr.strip()}" if done.returncode else ""


def wait_until(true: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """Raises AssertionError when `true` has not become so within `limit_s`."""
    ends_at = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < ends_at, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)


class Host:
    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        first = FIRST.format(name=name, folder=folder, sshd=sshd)
        for stale in folder.glob(f"{name}.*"):
            stale.unlink()
        self.process = subprocess.Popen([*UNSHARE, "sh", "-c", first], stdin=subprocess.PIPE)
        self._wait_for("up")
        [self.pid] = children(self.process.pid)  # its first process, as this machine sees it

    def _wait_for(self, state: str) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"{self.name} could not start"
            return (self.folder / f"{self.name}.{state}").exists()

        wait_until(reached, f"{self.name} {state}")

    def begin(self) -> None:
        """Start sshd, once there is a network."""
        assert self.process.stdin
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        self._wait_for("ready")

    def inside(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--pid", "--mount", *words]

    def do(self, *words: str) -> None:
        subprocess.run(self.inside(*words), check=True, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        """All its processes at once, as a loss of power does."""
        self.process.kill()
        self.process.wait()
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate(timeout=PATIENCE_S)


class Network:
    """The first host and the others, by name."""

    def __init__(self, folder: Path, names: list[str]):
        folder.mkdir(parents=True)
        self.folder, self.hosts = folder, {}
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        self.addresses = {name: f"{PREFIX}.{number}" for number, name in enumerate([HEAD, *names], 1)}
        lines = [f"{address} {name}" for name, address in self.addresses.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        try:
            for name in self.addresses:
                self.start(name)
        except BaseException:
            self.stop()
            raise

    def start(self, name: str) -> Host:
        """A new host of this name, with its place on the bridge."""
        host = self.hosts[name] = Host(self.folder, name)
        head, address = self.hosts[HEAD], f"{self.addresses[name]}/24"
        if name == HEAD:
            head.do("ip", "link", "add", "br0", "type", "bridge")
            head.do("ip", "address", "add", address, "dev", "br0")
            head.do("ip", "link", "set", "br0", "up")
        else:
            earlier = head.inside("ip", "link", "del", name)
            subprocess.run(earlier, check=False, capture_output=True)
            pair = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            # the namespace's number is one of this machine's processes, which the first host does not see
            subprocess.run(["nsenter", "-t", str(head.pid), "--net", *pair], check=True)
            head.do("ip", "link", "set", name, "master", "br0", "up")
            host.do("ip", "address", "add", address, "dev", "eth0")
            host.do("ip", "link", "set", "eth0", "up")
        host.begin()
        return host

    def cut(self, name: str) -> None:
        """Take the host's cable out."""
        self.hosts[HEAD].do("ip", "link", "set", name, "down")

    def variables(self) -> dict[str, str]:
        """Of a command on the first host that reaches the others."""
        return {**os.environ, "PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}"}

    def stop(self) -> None:
        for host in reversed(self.hosts.values()):
            host.stop()


@contextmanager
def network(folder: Path, *names: str) -> Iterator[Network]:
    made = Network(folder, list(names))
    try:
        yield made
    finally:
        made.stop()


def children(pid: int) -> list[int]:
    """Pids of a process's children, as this machine sees them."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
