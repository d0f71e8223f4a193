"""Ways to start a job, and what happens when it cannot start. Every process here is started as users start theirs."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from team import free_port, rank_environment

SUM = """
import numpy as np, roundel
roundel.init()
total = roundel.allreduce(np.arange(3.0) + roundel.rank(), op=roundel.Sum)
assert total.tolist() == [roundel.size() * i + sum(range(roundel.size())) for i in range(3)], total
assert roundel.local_size() == roundel.size() and roundel.local_rank() == roundel.rank()
assert (roundel.cross_rank(), roundel.cross_size()) == (0, 1)
print("sum is right on", roundel.rank(), "of", roundel.size())
"""
TWICE = """
import numpy as np, roundel
for epoch in (1, 2, 3):
    roundel.init()
    roundel.init()
    assert roundel.is_initialized() and roundel.communicator().epoch == epoch
    assert roundel.allreduce(np.ones(5), op=roundel.Sum)[0] == roundel.size()
    roundel.shutdown()
    roundel.shutdown()
    assert not roundel.is_initialized()
print("done")
"""


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("ROUNDEL_", "HOROVOD_", "OMPI_", "PMI_", "SLURM_"))}


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def run(command: list[str], timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("program", [SUM, TWICE])
def test_roundelrun(program):
    done = run([script("roundelrun"), "-np", "3", sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum is right") + done.stdout.count("done") == 3


@pytest.mark.parametrize("program", [SUM, TWICE])
def test_torchrun(program, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "program.py"
    path.write_text(program)
    done = run([script("torchrun"), "--nproc-per-node", "3", str(path)], timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum is right") + done.stdout.count("done") == 3


def test_a_process_that_nobody_launched_is_a_job_of_one():
    done = run([sys.executable, "-c", SUM])
    assert done.stdout.strip() == "sum is right on 0 of 1", done.stderr


def start_by_hand(size: int, program: str, tmp_path: Path, **changes) -> list[subprocess.Popen]:
    """Ranks by plain variables; changes: {rank: {variable: value}} as rank0={...}, and port=."""
    token = tmp_path / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_bytes(secrets.token_bytes(32))
    port = changes.get("port") or free_port()
    processes = []
    for rank in range(size):
        change = changes.get(f"rank{rank}", {})
        if change is None:
            continue
        env = rank_environment(rank, size, port, str(token), changes.get("transport", "shm")) | change
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return processes


def outputs(processes: list[subprocess.Popen], timeout: float = 30) -> list[tuple[int, str, str]]:
    try:
        return [(p.returncode, out, err) for p in processes for out, err in [p.communicate(timeout=timeout)]]
    finally:
        for p in processes:
            p.kill()
            p.wait()


def test_a_rank_that_never_arrives_is_named_by_all_others(tmp_path):
    quick = {"ROUNDEL_START_TIMEOUT": "1.5"}
    results = outputs(start_by_hand(4, SUM, tmp_path, rank0=quick, rank1=quick, rank2=None, rank3=quick))
    for code, _, err in results:
        assert code == 1
        assert "roundel.errors.TimeoutError" in err and "1 of 4 ranks did not arrive" in err and "rank 2" in err, err


def test_a_wrong_token_is_refused_and_the_others_learn_who_is_missing(tmp_path):
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_bytes(secrets.token_bytes(32))
    quick = {"ROUNDEL_START_TIMEOUT": "2"}
    results = outputs(
        start_by_hand(3, SUM, tmp_path, rank0=quick, rank1=quick, rank2=quick | {"ROUNDEL_TOKEN_FILE": str(wrong)})
    )
    assert "HandshakeError" in results[2][2] and "token" in results[2][2], results[2][2]
    assert all("rank 2" in err and "TimeoutError" in err for _, _, err in results[:2])


def test_different_settings_are_an_error_that_shows_both(tmp_path):
    results = outputs(start_by_hand(2, SUM, tmp_path, rank1={"ROUNDEL_TRANSPORT": "tcp"}))
    for code, _, err in results:
        assert code == 1 and "ROUNDEL_TRANSPORT=tcp" in err and "ROUNDEL_TRANSPORT=shm" in err, err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ROUNDEL_RANK": "7"}, "ROUNDEL_RANK"),
        ({"ROUNDEL_SIZE": "two"}, "ROUNDEL_SIZE"),
        ({"ROUNDEL_RENDEZVOUS": "nowhere"}, "ROUNDEL_RENDEZVOUS"),
        ({"ROUNDEL_TOKEN_FILE": "/nonexistent"}, "/nonexistent"),
        ({"ROUNDEL_TRANSPORT": "pigeon"}, "pigeon"),
        ({"ROUNDEL_TIMEOUT": "soon"}, "soon"),
        ({"ROUNDEL_ALGORITHM": "rign", "ROUNDEL_SIZE": "1"}, None),  # a job of one needs no plan
    ],
)
def test_nonsense_in_the_environment_is_named(tmp_path, changes, expected):
    [(code, _, err)] = outputs(start_by_hand(1, SUM, tmp_path, rank0=changes))
    assert (code == 0) if expected is None else (code == 1 and expected in err), err


def test_settings_under_horovods_names_are_used_and_told_once(tmp_path):
    theirs = {"HOROVOD_START_TIMEOUT": "1.5", "HOROVOD_LOG_LEVEL": "WARNING"}
    program = SUM + "roundel.shutdown(); roundel.init()"
    results = outputs(start_by_hand(2, program, tmp_path, rank0=theirs, rank1=theirs))
    note = "HOROVOD_START_TIMEOUT as ROUNDEL_START_TIMEOUT=1.5, HOROVOD_LOG_LEVEL as ROUNDEL_LOG_LEVEL=warning"
    assert [(code, err.count(note)) for code, _, err in results] == [(0, 1), (0, 0)], results
    [(code, _, err)] = outputs(start_by_hand(2, SUM, tmp_path, rank0=theirs, rank1=None))
    assert code == 1 and "did not arrive within 1.5 s" in err


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_strangers_at_the_rendezvous_do_not_disturb_the_start(tmp_path):
    """Garbage, half a greeting and silence on rank 0's port, from more clients than it serves at a time."""
    port = free_port()
    first = start_by_hand(2, SUM, tmp_path, port=port, rank1=None)
    deadline = time.monotonic() + 20
    while not listening(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    strangers = []
    for i in range(80):
        s = socket.create_connection(("127.0.0.1", port), timeout=5)
        with_data = [b"", b"GET / HTTP/1.1\r\n\r\n" * 20, secrets.token_bytes(4096), b"ROUNDEL1" + secrets.token_bytes(72)][
            i % 4
        ]
        if with_data:
            s.sendall(with_data)
        strangers.append(s)
    second = start_by_hand(2, SUM, tmp_path, port=port, rank0=None)
    results = outputs(first + second)
    assert [code for code, _, _ in results] == [0, 0], results
    for s in strangers:
        s.close()


def test_ctrl_c_ends_a_wait(tmp_path):
    program = """
import os, signal, threading, time
import numpy as np, roundel
roundel.init()
if roundel.rank() == 0:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        roundel.allreduce(np.ones(3))
    except KeyboardInterrupt:
        print("interrupted after", time.monotonic() - started < 3)
else:
    time.sleep(2)
    try:
        roundel.allreduce(np.ones(3))  # may succeed: rank 0 had given its part
        roundel.allreduce(np.ones(3))
    except roundel.RoundelError as error:
        print("told", "KeyboardInterrupt" in str(error) or "rank 0" in str(error))
"""
    results = outputs(start_by_hand(2, program, tmp_path))
    assert "interrupted after True" in results[0][1], results
    assert "told True" in results[1][1], results


def test_a_slow_start_of_one_rank_is_waited_for(tmp_path):
    late = "import time; time.sleep(2)\n" + SUM
    first = start_by_hand(2, SUM, tmp_path, port=(port := free_port()), rank1=None)
    second = start_by_hand(2, late, tmp_path, port=port, rank0=None)
    assert [code for code, _, _ in outputs(first + second)] == [0, 0]


def test_nothing_of_a_job_listens_after_the_start(tmp_path):
    program = """
import os, numpy as np, roundel
roundel.init()
roundel.allreduce(np.ones(2))
mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
sockets = {link[8:-1] for link in mine if link.startswith("socket:[")}
listening = [line for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]
             if line.split()[3] == "0A" and line.split()[9] in sockets]
assert not listening, listening
print("quiet")
"""
    for transport in ("shm", "tcp"):
        results = outputs(start_by_hand(2, program, tmp_path, transport=transport))
        assert [out.strip() for _, out, _ in results] == ["quiet", "quiet"], results


def test_many_threads_may_call(tmp_path):
    program = """
import threading, numpy as np, roundel
roundel.init()
comm = roundel.communicator()
lock, results = threading.Lock(), []
def work():
    for _ in range(50):
        with lock:  # the order of collectives is the caller's to keep
            handle = comm.allreduce_async(np.ones(1000))
        results.append(handle.wait()[0])
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert results == [2.0] * 200
print("fine")
"""
    results = outputs(start_by_hand(2, program, tmp_path))
    assert [out.strip() for _, out, _ in results] == ["fine", "fine"], results


def test_ranks_end_when_the_launcher_is_killed():
    sleeper = "import roundel, time, os; roundel.init(); print('pid', os.getpid(), flush=True); time.sleep(60)"
    job = subprocess.Popen(
        [script("roundelrun"), "-np", "2", sys.executable, "-c", sleeper],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    job.send_signal(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 3
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    job.stdout.close()
