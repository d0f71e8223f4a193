"""Ranks that are killed: every survivor raises PeerLostError within a second, nothing hangs, nothing is left behind.

At chosen phases of the protocol: test_faults.py; by the hundred: test_soak_kills.py.
"""

from __future__ import annotations

import hmac
import os
import statistics
import time
from pathlib import Path

import pytest
from fault_job import BOUND, FaultJob
from test_soak_kills import kill_many


def left_behind(token: bytes) -> list[str]:
    """Names of a job on this host: its abstract sockets, and whatever else of ours has a name."""
    job = hmac.new(token, b"roundel job", "sha256").hexdigest()[:32]
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if job in line]
    return sockets + [name for name in os.listdir("/dev/shm") if "roundel" in name]


@pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (4, "shm"), (2, "tcp"), (4, "hosts")])
def test_killed_ranks_are_noticed_within_a_second(tmp_path, size, transport):
    took = kill_many(tmp_path, 10, size, transport, None, fork=False)
    print(f"{transport}, {size} ranks: noticed after {statistics.median(took) * 1e3:.1f} ms, at most {max(took) * 1e3:.1f} ms")
    assert max(took) < 3 * BOUND, took  # this machine may be busy


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_forked_child_does_not_hide_its_parents_death(tmp_path, transport):
    assert max(kill_many(tmp_path, 1, 3, transport, None, fork=True)) < 3 * BOUND


@pytest.mark.parametrize("victims", [[1], [0, 1, 2, 3]])
def test_nothing_is_left_behind(tmp_path, victims):
    with FaultJob(4, "hosts", tmp_path) as job:
        job.wait_running()
        time.sleep(0.3)
        for rank in victims:
            job.kill(rank)
        for rank in set(range(4)) - set(victims):
            job.error_of(rank)
        for process in job.processes:
            process.wait()
        deadline = time.monotonic() + 3 * BOUND
        while left_behind(job.secret) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left_behind(job.secret)
