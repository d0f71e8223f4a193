"""Jobs with somebody on the same machine who does not know the token: the job is right all the same, and nothing tells it."""

from __future__ import annotations

import ast
import base64
import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from team import free_port, rank_environment

ROOT = Path(__file__).parents[2]
NOBODY = 65534

JOB = """
import sys, time
import numpy as np, roundel
time.sleep(float(sys.argv[1]) * (int(__import__("os").environ["ROUNDEL_RANK"]) > 0))
roundel.init()
for n in (1, 1000, 100_000):
    assert (roundel.allreduce(np.full(n, roundel.rank() + 1.0), op=roundel.Sum) == sum(range(roundel.size() + 1))).all()
print("right", flush=True)
sys.stdin.read()
"""


class Job:
    """Ranks started by hand; with `late` all but rank 0 come that many seconds later."""

    def __init__(self, size: int, transport: str, directory: Path, late: float = 0) -> None:
        self.secret, self.port = secrets.token_bytes(32), free_port()
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_bytes(self.secret)
        self.logs = [directory / f"log{r}" for r in range(size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = rank_environment(rank, size, self.port, str(token), transport) | {"ROUNDEL_LOG_LEVEL": "debug"}
            with open(log, "wb") as file:
                command = [sys.executable, "-c", JOB, str(late)]
                self.processes.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=file, stderr=file))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()

    def until_right(self, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not all("right" in log.read_text() for log in self.logs):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.02)

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        assert [p.wait(20) for p in self.processes] == [0] * len(self.processes), self.said()

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def sockets(self) -> set[str]:
        found = set()
        for process in self.processes:
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{process.pid}/fd"):
                    with contextlib.suppress(OSError):
                        found.update(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{process.pid}/fd/{fd}")))
        return found

    def listening(self) -> set[tuple[str, int]]:
        """(address as /proc/net writes it, port) of every TCP socket of the job that listens."""
        ours, found = self.sockets(), set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in ours:
                    address, port = fields[1].split(":")
                    found.add((address, int(port, 16)))
        return found


class Attack:
    """Garbage, silence, one byte at a time and replayed hellos, at every port of the job for as long as it starts."""

    def __init__(self, job: Job) -> None:
        self.job, self.stop, self.tries, self.addresses = job, threading.Event(), 0, set()
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(3)]

    def work(self, seed: int) -> None:
        kept: list[socket.socket] = []
        while not self.stop.is_set():
            listening = self.job.listening()
            self.addresses |= listening
            for _, port in listening or {("", self.job.port)}:
                for kind in range(16):
                    with contextlib.suppress(OSError):
                        s = socket.create_connection(("127.0.0.1", port), timeout=1)
                        hello = b"ROUNDEL2" + secrets.token_bytes(72)
                        s.sendall([secrets.token_bytes(500), b"", hello[:1], hello][(kind + seed) % 4] or b"R")
                        kept.append(s)
                        self.tries += 1
            while len(kept) > 150:
                kept.pop(0).close()
        for s in kept:
            s.close()

    def __enter__(self) -> Attack:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_job_starts_and_is_right_while_its_ports_are_attacked(transport, tmp_path):
    with Job(3, transport, tmp_path, late=1.0) as job, Attack(job) as attack:
        job.until_right()
        assert attack.tries > 50
        assert all(address == "0100007F" for address, _ in attack.addresses), attack.addresses  # 127.0.0.1 and nothing else
        assert job.listening() == set()  # after init nothing of the job listens
        attack.stop.set()
        job.end()


def test_nothing_tells_the_token(tmp_path):
    with Job(2, "tcp", tmp_path) as job:
        job.until_right()
        seen = b"".join(log.read_bytes() for log in job.logs)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    seen += Path(f"/proc/{pid}/{name}").read_bytes()
        encoded = [job.secret, job.secret.hex().encode(), base64.b64encode(job.secret).rstrip(b"="), repr(job.secret).encode()]
        assert not any(form in seen for form in encoded)
        job.end()


MEMORY = """
import os, sys
os.setuid(int(sys.argv[1]))
opened = 0
for fd in os.listdir("/proc/self/fd") if sys.argv[2] == "self" else range(64):
    try:
        os.close(os.open(f"/proc/{sys.argv[2]}/fd/{fd}", os.O_RDWR))
        opened += 1
    except OSError:
        pass
print(opened)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_cannot_open_the_shared_memory(tmp_path):
    with Job(2, "shm", tmp_path) as job:
        job.until_right()
        pid = job.processes[0].pid
        memory = [fd for fd in os.listdir(f"/proc/{pid}/fd") if "memfd:roundel" in os.readlink(f"/proc/{pid}/fd/{fd}")]
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:roundel" in maps
        assert all(os.stat(f"/proc/{pid}/fd/{fd}").st_mode & 0o077 == 0 for fd in memory)
        opened = subprocess.run(
            [sys.executable, "-I", "-c", MEMORY, str(NOBODY), str(pid)], capture_output=True, text=True, check=True, timeout=20
        )
        assert opened.stdout.strip() == "0", opened.stdout
        job.end()


def test_pickle_stays_out_of_the_control_plane():
    users = set()
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in {"pickle", "marshal", "shelve", "dill", "cloudpickle"} for name in names):
                users.add(str(path.relative_to(ROOT / "python" / "roundel")))
    assert users == {"objects.py"}


def test_the_token_is_overwritten_after_its_use(tmp_path):
    program = """
import roundel
from roundel import world
kept = []
detect = world.detect
world.detect = lambda **how: (kept.append(detect(**how)), kept[0])[1]
roundel.init()
assert kept[0].token == bytes(32), "the token is still there"
print("gone")
"""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_bytes(secrets.token_bytes(32))
    env = rank_environment(0, 1, free_port(), str(token), "shm")
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "gone", done.stderr
