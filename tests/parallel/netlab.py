"""Hosts on one machine: network namespaces with their own addresses, host names and /dev/shm, joined by a switch of their own.

    with NetLab(hosts=2, rate="200mbit") as lab:
        process = lab.popen(1, ["python", "script.py"], env)

A host is a network namespace with `lo` and `eth0`, one end of a veth pair, and `eth1`, `eth2` where it is in several networks.
The other ends are the ports of bridges, one for each network, in one more namespace: the machine's own network is never
touched. An anchor process keeps each host's name and mounts, and ends with its maker. Processes keep their pids and see the
machine's files: only network, host name and /dev/shm are apart.
Needs root, iproute2 and util-linux; why_not() says what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PREFIX = "roundel-lab-"  # then the maker's pid, the subnet, and what it is: roundel-lab-4711-12-h0
NAMESPACES = Path("/run/netns")
COMMAND_SECONDS = 20  # no single command here takes longer than milliseconds
_BECOME_HOST = 'hostname "$0" && mount -t tmpfs none /dev/shm && echo ready && exec cat'


class LabError(RuntimeError):
    """The lab cannot be made, or a command in it failed; the text has the command and what it said."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


@functools.cache
def why_not() -> str | None:
    """Why no lab can be made here, for pytest.skip; None when one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    try:
        with NetLab(hosts=1, rate="1gbit"):
            return None
    except LabError as error:
        return f"no network namespaces here: {error}"


def namespaces() -> list[str]:
    """All labs' namespaces, also those of other processes."""
    return sorted(p.name for p in NAMESPACES.glob(f"{PREFIX}*")) if NAMESPACES.is_dir() else []


def _remove(namespace: str) -> None:
    """Kill what runs in it, then delete it. The veth pairs in it go with it."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(LabError):  # someone else has removed it
            pids = _run("ip", "netns", "pids", namespace).split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if pids:
                time.sleep(0.01)
                continue
        break
    with contextlib.suppress(LabError):
        _run("ip", "netns", "delete", namespace)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"  # nobody may have reaped it
    except OSError:
        return False


def remove_stale() -> None:
    """Remove the labs whose makers have ended without doing so."""
    for name in namespaces():
        match = re.match(rf"{PREFIX}(\d+)-", name)
        if match and not _runs(int(match[1])):
            _remove(name)


class NetLab:
    """`hosts` hosts, numbered from 0, at 10.77.<subnet>.<host + 1>. Use as a context manager.

    rate: what each host may send, in tc's words ("200mbit"); None for no limit. networks: how many join the hosts; the second,
    of every host's eth1, is 10.78.<subnet>.0/24.
    Raises LabError when it cannot be made; nothing is left behind then.
    """

    def __init__(self, hosts: int = 2, rate: str | None = None, networks: int = 1) -> None:
        self.hosts, self.rate, self.networks = hosts, rate, networks
        self.processes: list[subprocess.Popen] = []
        self._anchors: list[subprocess.Popen] = []

    def __enter__(self) -> NetLab:
        try:
            remove_stale()
            self._take_subnet()
            self._make_switch()
            for host in range(self.hosts):
                self._make_host(host)
        except BaseException as error:
            self.close()
            if isinstance(error, (OSError, subprocess.TimeoutExpired)):
                raise LabError(str(error)) from error
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab and remove its namespaces."""
        for process in (*self.processes, *self._anchors):
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):  # unwritten input of a process that has ended
                        stream.close()
        self.processes, self._anchors = [], []
        for name in namespaces():
            if name.startswith(self._name("")):
                _remove(name)

    # -- what tests use

    def address(self, host: int, network: int = 0) -> str:
        return f"10.{77 + network}.{self.subnet}.{host + 1}"

    def namespace(self, host: int) -> str:
        return self._name(f"h{host}")

    def popen(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **kw) -> subprocess.Popen:
        """Start a process on a host; its pid is the program's own. Options are subprocess.Popen's."""
        process = subprocess.Popen(self._on(host, argv, kw.pop("cwd", None)), env=env, **kw)
        self.processes.append(process)
        return process

    def run(self, host: int, *argv: str) -> str:
        """Run a short command on a host; its output. Raises LabError when it fails."""
        return _run(*self._on(host, argv, None))

    def set_link(self, host: int, up: bool, network: int = 0) -> None:
        """Pull a host's cable out of the switch, or put it back: packets vanish, nobody is told."""
        _run("ip", "-n", self._name("sw"), "link", "set", f"port{network}.{host}", "up" if up else "down")

    def bytes_sent(self, host: int, network: int = 0) -> int:
        """Into a network since the lab was made."""
        return int(self.run(host, "cat", f"/sys/class/net/eth{network}/statistics/tx_bytes"))

    # -- making it

    def _name(self, what: str) -> str:
        return f"{PREFIX}{os.getpid()}-{self.subnet}-{what}"

    def _take_subnet(self) -> None:
        taken = {int(match[1]) for name in namespaces() if (match := re.match(rf"{PREFIX}\d+-(\d+)-", name))}
        # Labs of other processes start elsewhere. (Should two ever collide, their switches are still apart.)
        candidates = ((os.getpid() + i) % 254 + 1 for i in itertools.count())
        self.subnet = next(x for x in candidates if x not in taken or len(taken) >= 254)

    def _make_switch(self) -> None:
        switch = self._name("sw")
        _run("ip", "netns", "add", switch)
        for network in range(self.networks):
            _run("ip", "-n", switch, "link", "add", f"switch{network}", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", f"switch{network}", "up")

    def _make_host(self, host: int) -> None:
        _run("ip", "netns", "add", self.namespace(host))
        _run("ip", "-n", self.namespace(host), "link", "set", "lo", "up")
        for network in range(self.networks):
            self._plug_in(host, network)
        self._anchor(host)

    def _plug_in(self, host: int, network: int) -> None:
        switch, here = self._name("sw"), self.namespace(host)
        device, port = f"eth{network}", f"port{network}.{host}"
        _run("ip", "link", "add", device, "netns", here, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", switch, "link", "set", port, "master", f"switch{network}", "up")
        _run("ip", "-n", here, "addr", "add", f"{self.address(host, network)}/24", "dev", device)
        _run("ip", "-n", here, "link", "set", device, "up")
        if self.rate is not None:  # burst: more than a segment of 64 KiB, and 5 ms at 200 Mbit/s
            limit = ("rate", self.rate, "burst", "128kb", "latency", "100ms")
            _run("tc", "-n", here, "qdisc", "add", "dev", device, "root", "tbf", *limit)

    def _anchor(self, host: int) -> None:
        """A process that holds the host's name and its own /dev/shm until our end of its stdin is closed."""
        own = ("unshare", "--uts", "--mount", "sh", "-c", _BECOME_HOST, f"h{host}")
        command = ["ip", "netns", "exec", self.namespace(host), *own]
        pipe = subprocess.PIPE
        anchor = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._anchors.append(anchor)
        ready, _, _ = select.select([anchor.stdout], [], [], COMMAND_SECONDS)
        if not ready or anchor.stdout.readline() != "ready\n":
            anchor.kill()
            raise LabError(f"{' '.join(command)}: {anchor.stderr.read().strip() or 'no answer'}")

    def _on(self, host: int, argv: Sequence[str], cwd: str | os.PathLike | None) -> list[str]:
        target = f"--target={self._anchors[host].pid}"
        return [shutil.which("nsenter"), target, "--net", "--uts", "--mount", f"--wdns={os.path.abspath(cwd or '.')}", *argv]
