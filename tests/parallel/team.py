"""Teams: N rank processes that run test functions one after another, under a watchdog.

The parent talks to each rank over its stdin and stdout, a line of JSON each way. A rank that does not answer in time has the
stacks of all its threads dumped, then the whole team is killed: a hang is a failure with a reason, never a hang. Ranks end when
their stdin ends, so nothing outlives the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nursery import Rank

WATCHDOG_SECONDS = 90
HERE = Path(__file__).parent

# What distinguishes a way for bytes to travel: settings of all ranks, and settings by rank.
TRANSPORTS: dict[str, dict[str, str]] = {
    "shm": {"ROUNDEL_TRANSPORT": "shm"},
    "tcp": {"ROUNDEL_TRANSPORT": "tcp"},
    "ring": {"ROUNDEL_ALGORITHM": "ring"},
    "tree": {"ROUNDEL_ALGORITHM": "tree"},
    "hosts": {},  # two pretended hosts: shared memory inside, TCP across
    "hierarchical": {"ROUNDEL_ALGORITHM": "hierarchical"},  # the same hosts
}
ALGORITHMS = ("direct", "pairwise", "doubling", "halving", "bruck", "swing")  # forced, on one host
TRANSPORTS |= {name: {"ROUNDEL_ALGORITHM": name} for name in ALGORITHMS}
PRETENDED_HOSTS = {"hosts", "hierarchical"}


class TeamError(AssertionError):
    """A test failed on some ranks, or a rank hung or died."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, size: int, port: int, token_file: str, transport: str) -> dict[str, str]:
    """Environment of one rank, started by hand with plain variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROUNDEL_")}
    env |= TRANSPORTS[transport]
    env |= {
        "ROUNDEL_RANK": str(rank),
        "ROUNDEL_SIZE": str(size),
        "ROUNDEL_RENDEZVOUS": f"127.0.0.1:{port}",
        "ROUNDEL_TOKEN_FILE": token_file,
        "ROUNDEL_TIMEOUT": "60",
        "OMP_NUM_THREADS": "1",
    }
    if transport in PRETENDED_HOSTS:
        env["ROUNDEL_HOST_ID"] = f"host {rank % 2}"
    return env


class Team:
    """Rank processes of one job. Use as a context manager."""

    def __init__(self, size: int, transport: str, extra_env: dict[str, str] | None = None) -> None:
        self.size, self.transport, self.extra_env = size, transport, extra_env or {}
        self.processes: list[subprocess.Popen] = []
        self.broken = True

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def start(self) -> None:
        self.stop()
        self.directory = tempfile.TemporaryDirectory(prefix="roundel-team-")
        token_file = Path(self.directory.name) / "token"
        token_file.touch(mode=0o600)
        token_file.write_bytes(secrets.token_bytes(32))
        port = free_port()
        self.logs = [open(Path(self.directory.name) / f"rank{r}.log", "w+b") for r in range(self.size)]  # noqa: SIM115
        for rank in range(self.size):
            env = rank_environment(rank, self.size, port, str(token_file), self.transport) | self.extra_env
            self.processes.append(
                Rank(
                    [sys.executable, str(HERE / "worker.py")],
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.logs[rank],
                )
            )
        self.broken = False
        self.collect("init")

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()  # the rank leaves the job and ends
        deadline = time.monotonic() + (0 if self.broken else 10)
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self.processes:
            for log in self.logs:
                log.close()
            self.directory.cleanup()
        self.processes = []
        self.broken = True

    def run(self, module: str, function: str, arguments: dict) -> None:
        """Run a test function on every rank; raise TeamError with the tracebacks of those where it failed."""
        if self.broken:
            self.start()
        line = json.dumps({"module": module, "function": function, "arguments": arguments}).encode() + b"\n"
        for process in self.processes:
            process.stdin.write(line)
            process.stdin.flush()
        self.collect(function)

    def collect(self, what: str) -> None:
        answers: dict[int, dict] = {}
        deadline = time.monotonic() + WATCHDOG_SECONDS
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0, deadline - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    line = key.fileobj.readline()
                    answers[key.data] = json.loads(line) if line else {"error": "the rank ended", "fatal": True}
                    selector.unregister(key.fileobj)
        silent = [r for r in range(self.size) if r not in answers]
        if not silent and not any(a["error"] for a in answers.values()):
            return
        self.broken = True
        for rank in silent:
            self.processes[rank].send_signal(signal.SIGUSR1)  # faulthandler writes all stacks to the log
        time.sleep(0.5 if silent else 0)
        parts = [f"{what} failed over {self.transport} with {self.size} ranks"]
        parts += [f"--- rank {r}: no answer within {WATCHDOG_SECONDS} s" for r in silent]
        parts += [f"--- rank {r}: {a['error']}" for r, a in sorted(answers.items()) if a["error"]]
        for rank, log in enumerate(self.logs):
            log.seek(0)
            text = log.read().decode(errors="replace")[-6000:]
            if text:
                parts.append(f"--- stderr of rank {rank}:\n{text}")
        raise TeamError("\n".join(parts))
