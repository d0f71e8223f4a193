"""After ranks have called different things, no rank comes through the next operation in which all wait for all.

A rank whose own part in an operation is complete need not see that others disagreed about it. What comes next shows it: frames
carry a hash of what their sender has called before. Groups come and go, so that one job sees many mismatches.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from reference import assert_equal_bits, over_ranks, ranks_data
from roundel import MismatchError

TEAMS = [("shm", 3), ("tcp", 2), ("tcp", 4), ("hosts", 3), ("hosts", 4), ("tree", 4), ("hierarchical", 4)]
COUNTS = (10, 1000, 100_000, 1_000_000)


@pytest.mark.parametrize("what", ["root", "name"])
def test_nobody_passes_a_barrier_after_a_mismatch(comm, what):
    pauses = random.Random(comm.rank)
    odd = comm.rank == 1
    for i in range(24):
        group = comm.split(0)
        x = np.full(COUNTS[i % len(COUNTS)], comm.rank, np.float32)
        time.sleep(pauses.choice((0, 0, 0.005 * pauses.random())))
        started = time.monotonic()
        with pytest.raises(
            MismatchError, match=r"root [01] .*root [01] " if what == "root" else "rank . called .* where rank . called"
        ):
            if what == "root":
                group.broadcast(x, int(odd))
            else:
                group.broadcast(x, 0, name="odd" if odd else "even")
            time.sleep(pauses.choice((0, 0, 0.005 * pauses.random())))
            group.barrier()
        assert time.monotonic() - started < 3
        group.shutdown(0.1)
        comm.barrier()


def test_what_differs_by_rank_and_may_is_no_divergence(comm):
    """Numbers of rows, splits, who sends and who only receives, transfers between some: histories are equal all the same."""
    size, rank = comm.size, comm.rank
    for i in range(10):
        rows = [(i + r) % 3 * 10 for r in range(size)]
        pieces = [ranks_data(r, rows[r], "float32") for r in range(size)]
        assert_equal_bits(comm.allgather(pieces[rank], rows), np.concatenate(pieces))
        comm.alltoall(np.ones(sum(rows)), splits=rows)
        comm.gather(np.ones(rows[rank]), i % size, rows)
        comm.broadcast(np.ones(0), i % size)
        if rank == 0:
            comm.send(np.ones(5), size - 1)
        elif rank == size - 1:
            comm.recv(np.empty(5), 0)
        assert_equal_bits(comm.allreduce(ranks_data(rank, 100, "int32")), over_ranks("Sum", size, 100, "int32"))
        comm.barrier()
