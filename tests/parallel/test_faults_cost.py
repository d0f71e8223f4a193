"""What waiting, watching and recording cost: processor time of ranks that wait or idle, and nothing that grows."""

from __future__ import annotations

import itertools
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import roundel
from team import Team

TEAMS = [("shm", 2), ("tcp", 2), ("hosts", 4)]
at_first: list[tuple[int, int, int]] = []  # footprint() before what is counted, on a rank


def cpu_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_a_rank_that_waits_two_seconds_uses_a_twentieth_of_a_core_at_most(comm):
    comm.barrier()
    before = cpu_seconds()
    if comm.rank == comm.size - 1:
        time.sleep(2)
    comm.allreduce(np.ones(10))
    assert cpu_seconds() - before < 0.1


def test_heartbeats_cost_next_to_nothing(comm):
    comm.barrier()
    before = cpu_seconds()
    time.sleep(2)
    assert cpu_seconds() - before < 0.02


def footprint() -> tuple[int, int, int]:
    """Descriptors, threads, and kilobytes of memory that no file or peer backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), int(status["Threads"]), int(status["RssAnon"].split()[0])


def do_collectives(comm, calls: int) -> None:
    x, big = np.ones(100, np.float32), np.ones(50_000, np.float32)
    for i in range(calls // 10):
        for _ in range(5):
            comm.allreduce(x, name=f"name.{i}")
        comm.broadcast(x, i % comm.size)
        comm.allgather(np.ones(i % 50 + 1, np.float32))
        comm.allreduce_async(x).wait()
        comm.barrier()
        if i % 20 == 0:
            comm.allreduce(big)


def start_counting(comm) -> None:
    do_collectives(comm, 2000)
    at_first.append(footprint())


def end_counting(comm) -> None:
    before, after = at_first.pop(), footprint()
    assert after[:2] == before[:2], f"descriptors and threads: {before} became {after}"
    assert after[2] - before[2] < 4096, f"kilobytes: {before[2]} became {after[2]}"


def test_nothing_grows(comm):
    start_counting(comm)
    do_collectives(comm, 5000)
    end_counting(comm)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "size"), TEAMS)
def test_nothing_grows_over_a_hundred_thousand_collectives(transport, size):
    with Team(size, transport) as team:
        team.run("test_faults_cost", "start_counting", {})
        for _ in range(20):  # each under the team's watchdog
            team.run("test_faults_cost", "do_collectives", {"calls": 5000})
        team.run("test_faults_cost", "end_counting", {})


def test_the_flight_record_holds_the_last_operations(comm):
    for i in range(300):
        comm.allreduce(np.ones(8, np.float32), name=f"layer.{i}")
    handle = comm.allreduce_async(np.ones(3, np.int64), name="last")
    handle.wait()
    record = roundel.flight_record()
    assert len(record) == 256
    assert [e["name"] for e in record[-3:]] == ["layer.298", "layer.299", "last"]
    last = record[-1]
    assert (last["kind"], last["dtype"], last["bytes"], last["state"]) == ("all-reduce", "int64", 24, "done")
    assert time.time() - 60 < last["queued"] <= last["started"] <= last["finished"] < time.time() + 1
    assert all(b["sequence"] == a["sequence"] + 1 for a, b in itertools.pairwise(record))
