"""Jobs that something happens to: ranks of fault_rank.py, on this machine or on the hosts of a NetLab, and what they told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import subprocess
import sys
import time
from pathlib import Path

from nursery import Rank
from team import free_port, rank_environment

RANK = str(Path(__file__).parent / "fault_rank.py")
BOUND = 1.0  # seconds within which a death is noticed; what is asserted allows three times that, this machine may be busy
DEAD = 2.0  # ROUNDEL_DEAD_SECONDS of these jobs
WATCHDOG = 60


def sockets_of(pid: int) -> set[str]:
    """Inodes of its sockets."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(fd)))
    return found


class FaultJob:
    """Use as a context manager.

    env: settings of all ranks; env_of: {rank: settings}; lab, places: the hosts of the ranks; before: a command that runs them.
    """

    def __init__(
        self, size, transport, directory, program="mixed", *arguments, env=None, env_of=None, lab=None, places=None, before=()
    ) -> None:
        self.size, self.secret = size, secrets.token_bytes(32)
        token = Path(directory) / f"token{secrets.token_hex(4)}"
        token.touch(mode=0o600)
        token.write_bytes(self.secret)
        port = self.port = 4711 if lab else free_port()
        self.logs = [token.with_suffix(f".rank{r}.err") for r in range(size)]
        self.processes: list[subprocess.Popen] = []
        for rank in range(size):
            settings = rank_environment(rank, size, port, str(token), transport)
            settings |= {"ROUNDEL_DEAD_SECONDS": str(DEAD), "ROUNDEL_START_TIMEOUT": "20"}
            settings |= (env or {}) | (env_of or {}).get(rank, {})
            if lab:
                settings["ROUNDEL_RENDEZVOUS"] = f"{lab.address(places[0])}:{port}"
            start = subprocess.Popen if before else Rank
            command = [*before, sys.executable, RANK, program, *map(str, arguments)]
            with open(self.logs[rank], "wb") as log:
                kw = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "env": settings, "text": True}
                self.processes.append(lab.popen(places[rank], command, **kw) if lab else start(command, **kw))

    def __enter__(self) -> FaultJob:
        return self

    def __exit__(self, *exc) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if not stream.closed:
                    stream.close()

    def wait_running(self) -> None:
        for rank, process in enumerate(self.processes):
            line = process.stdout.readline()
            assert line and "running" in json.loads(line), f"rank {rank}: {line} {self.error_output(rank)}"

    def wait_connected(self, rank: int) -> None:
        """Until a rank on this machine has a connection to rank 0's rendezvous."""
        deadline = time.monotonic() + WATCHDOG
        while time.monotonic() < deadline:
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            inodes = {line[9] for line in lines if line[2].endswith(f":{self.port:04X}")}
            if inodes & sockets_of(self.processes[rank].pid):
                return
            time.sleep(0.01)
        raise AssertionError(f"rank {rank} does not connect; {self.error_output(rank)}")

    def error_output(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def kill(self, rank: int) -> float:
        at = time.time()
        self.processes[rank].kill()
        return at

    def ended_at(self, rank: int) -> float:
        """When a rank that kills itself had ended."""
        ended = os.pidfd_open(self.processes[rank].pid)
        try:
            ready, _, _ = select.select([ended], [], [], WATCHDOG)
            at = time.time()
        finally:
            os.close(ended)
        assert ready, f"rank {rank} has not ended"
        return at

    def told(self, rank: int, timeout: float = WATCHDOG) -> list[dict]:
        """All that a rank says until it ends."""
        output, _ = self.processes[rank].communicate(timeout=timeout)
        said = [json.loads(line) for line in output.splitlines()]
        assert not any("wrong" in line for line in said), f"wrong bits on rank {rank}: {said}"
        return said

    def error_of(self, rank: int, timeout: float = WATCHDOG) -> dict:
        errors = [line for line in self.told(rank, timeout) if "error" in line]
        assert len(errors) == 1, (
            f"rank {rank} told {errors}; ended with {self.processes[rank].returncode}; {self.error_output(rank)}"
        )
        return errors[0]
