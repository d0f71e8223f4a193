"""Groups of ranks: split into colors, used beside each other and beside the whole, ended in any order."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
import roundel
from reference import assert_equal_bits, over_ranks, ranks_data
from test_start import outputs, start_by_hand

TEAMS = [("shm", 1), ("shm", 2), ("shm", 4), ("tcp", 3), ("hosts", 4), ("ring", 3), ("shm", 7)]


def sum_of(ranks: list[int], count: int) -> np.ndarray:
    return sum(ranks_data(r, count, "int64") for r in ranks)


def test_groups_by_color_in_the_order_of_keys(comm):
    group = comm.split(comm.rank % 2, key=-comm.rank)
    members = [r for r in reversed(range(comm.size)) if r % 2 == comm.rank % 2]
    assert (group.size, group.members, group.members[group.rank]) == (len(members), members, comm.rank)
    for count in (0, 1, 1000, 100_000):
        assert_equal_bits(group.allreduce(ranks_data(comm.rank, count, "int64")), sum_of(members, count))
        assert_equal_bits(comm.allreduce(ranks_data(comm.rank, count, "int32")), over_ranks("Sum", comm.size, count, "int32"))
    x = np.full(10, comm.rank)
    assert_equal_bits(group.broadcast(x, group.size - 1), np.full(10, members[-1]))


def test_a_rank_may_stay_out(comm):
    group = comm.split(0 if comm.rank else None)
    if comm.rank == 0:
        assert group is None
    else:
        assert group.members == list(range(1, comm.size))
        group.barrier()
    comm.barrier()


def test_groups_of_groups_and_many_of_them(comm):
    for i in range(10):
        outer = comm.split(0)
        inner = outer.split((outer.rank + i) % 2)
        assert outer.members == list(range(comm.size))
        assert inner.members == [r for r in range(comm.size) if (r + i) % 2 == (comm.rank + i) % 2]
        assert_equal_bits(inner.allreduce(np.array([comm.rank])), np.array([sum(inner.members)]))
        inner.shutdown()
        outer.shutdown()


def test_two_groups_at_the_same_time_do_not_disturb_each_other(comm):
    halves, pairs = comm.split(comm.rank * 2 // comm.size), comm.split(comm.rank // 2)
    handles = []
    for i in range(30):  # in different orders on different ranks
        for group in (halves, pairs) if comm.rank % 2 else (pairs, halves):
            handles.append((group, i, group.allreduce_async(np.full(5000, comm.rank + i))))
    for group, i, handle in handles:
        assert_equal_bits(handle.wait(), np.full(5000, sum(group.members) + i * group.size))


def test_groups_leave_nothing_behind(comm):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task"))

    comm.split(0).shutdown()
    gc.collect()
    before = descriptors()
    for _ in range(10):
        comm.split(0).shutdown()
    gc.collect()
    assert descriptors() <= before


@pytest.mark.ends_communicator
def test_a_loss_in_a_group_is_told_in_ranks_of_the_job(comm):
    if comm.size < 3:
        return
    group = comm.split(0 if comm.rank else None)
    if comm.rank == comm.size - 1:
        group.shutdown()
    elif comm.rank > 0:
        with pytest.raises(roundel.PeerLostError, match=f"lost: rank {comm.size - 1} of the job") as caught:
            group.allreduce(np.ones(3))
        assert caught.value.ranks == (comm.size - 1,)
    comm.barrier()  # the job goes on


@pytest.mark.ends_communicator
def test_ranks_that_disagree_about_a_split_find_out(comm):
    if comm.size == 1:
        return
    with pytest.raises(roundel.MismatchError):
        if comm.rank == 0:
            comm.allreduce(np.ones(3))
        else:
            comm.split(0)
        comm.barrier()


@pytest.mark.ends_communicator
def test_a_group_that_is_dropped_says_goodbye(comm):
    if comm.size < 3:
        return
    group = comm.split(0)
    if comm.rank == 2:
        time.sleep(0.4)
    got = group.gather(np.full(2, comm.rank), 1)
    if comm.rank == 0:
        del group  # while rank 1 still waits for others
        gc.collect()
    if comm.rank == 1:
        assert_equal_bits(got, np.repeat(np.arange(comm.size), 2))
    comm.barrier()


@pytest.mark.ends_communicator
def test_pending_operations_of_a_group_name_the_lost_rank_once(comm):
    if comm.size < 3:
        return
    lost = comm.size - 1
    group = comm.split(0 if comm.rank else None)
    if comm.rank == lost:
        group.shutdown()
    elif comm.rank > 0:
        handles = [group.allreduce_async(np.ones(3)) for _ in range(2)]
        errors = []
        for handle in handles:
            with pytest.raises(roundel.PeerLostError) as caught:
                handle.wait()
            errors.append(caught.value)
        with pytest.raises(roundel.PeerLostError) as caught:
            group.barrier()
        for error in [*errors, caught.value]:
            assert error.ranks == (lost,) and str(error).count("in a group") == 1, error
        group.shutdown()
    comm.barrier()


@pytest.mark.ends_communicator
def test_leaving_waits_once_for_all_groups(comm):
    groups = [comm.split(0) for _ in range(3)]
    groups.append(groups[0].split(0))
    comm.barrier()
    if comm.rank == 0:
        started = time.monotonic()
        comm.shutdown(0.5)
        assert time.monotonic() - started < 1.2
    else:
        time.sleep(1.5)


def test_groups_take_less_address_space(comm):
    def mapped() -> int:
        ranges = [
            line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:roundel" in line
        ]
        return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)

    before = mapped()
    group = comm.split(0)
    if before > comm.size << 33:  # the job's arenas are larger than the least that a group gets
        assert mapped() - before < before / 2
    group.shutdown()


HEAD = """
import os, signal, threading, time
import numpy as np, roundel
roundel.init()
comm = roundel.communicator()
rank = comm.rank
"""

# A program for both ranks, and settings of rank 1.
PROGRAMS = {
    "Ctrl-C in a split reaches its caller, and the others hear of it": (
        """
if rank == 0:
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    comm.split(0)
    raise SystemExit("no error")
except KeyboardInterrupt:
    assert rank == 0
except roundel.RoundelError as error:
    assert rank == 1 and "split failed on rank 0" in str(error) and "KeyboardInterrupt" in str(error), error
comm.barrier()
assert comm.split(0).allreduce(np.ones(3))[0] == 2
""",
        {"ROUNDEL_FAILPOINT": "start-before-memory=sleep:1@3"},
    ),
    "whoever fails to join a group waits no longer than the others look for it": (
        """
try:
    comm.split(0)
    raise SystemExit("no error")
except roundel.RoundelError as error:
    assert "split failed on rank" in str(error), error
comm.barrier()
""",
        {"ROUNDEL_FAILPOINT": "start-connect=error@3"},
    ),
    "a signal handler uses other groups but not the one it interrupts": (
        """
alone = comm.split(rank)
seen = []
def handler(*_):
    alone.barrier()
    try:
        comm.barrier(timeout=1)
    except roundel.RoundelError as error:
        seen.append(str(error))
if rank == 0:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
else:
    time.sleep(0.6)
assert comm.allreduce(np.ones(3))[0] == 2
assert rank != 0 or "inside another operation" in seen[0]
""",
        {},
    ),
    "the log names ranks of the job": (
        """
comm.split(rank)
""",
        {"ROUNDEL_LOG_LEVEL": "info"},
    ),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_that(what, tmp_path):
    program, settings = PROGRAMS[what]
    patience = {"ROUNDEL_TIMEOUT": "4"}
    processes = start_by_hand(2, HEAD + program + 'print("fine")\n', tmp_path, rank0=patience, rank1=patience | settings)
    for code, out, err in outputs(processes):
        assert code == 0 and out == "fine\n", err
        assert "ROUNDEL_LOG_LEVEL" not in settings or "roundel [0]" not in err, err
