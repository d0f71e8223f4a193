"""Groups of ranks: split into colors, used beside each other and beside the whole, ended in any order."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
import roundel
from reference import assert_equal_bits, over_ranks, ranks_data

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
