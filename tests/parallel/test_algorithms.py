"""Every plan at work: each algorithm forced by name, at sizes that are powers of two and that are not."""

from __future__ import annotations

import numpy as np
import pytest
from reference import assert_equal_bits, assert_same_on_all_ranks, over_ranks, ranks_data
from team import ALGORITHMS

TEAMS = [(algorithm, size) for algorithm in (*ALGORITHMS, "ring", "tree", "hierarchical") for size in (2, 3, 8)]

COUNTS = [0, 1, 7, 4099, 300_001]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_reductions(comm, dtype):
    for count in COUNTS:
        x, expected = ranks_data(comm.rank, count, dtype), over_ranks("Sum", comm.size, count, dtype)
        assert_equal_bits(comm.allreduce(x), expected)
        assert_equal_bits(x, ranks_data(comm.rank, count, dtype))
        got = comm.reduce(x, comm.size - 1)
        if got is not None:
            assert_equal_bits(got, expected)
        rows = [count // comm.size + (r < count % comm.size) for r in range(comm.size)]
        begin = sum(rows[: comm.rank])
        assert_equal_bits(comm.reduce_scatter(x), expected[begin : begin + rows[comm.rank]])


def test_sums_are_the_same_bits_on_every_rank(comm):
    for count in COUNTS:
        x = np.random.default_rng(comm.rank).standard_normal(count).astype(np.float32)
        assert_same_on_all_ranks(comm, comm.allreduce(x))


def test_exchanges(comm):
    for count in COUNTS:
        x = ranks_data(comm.rank, count, "int32")
        everyone = np.concatenate([ranks_data(r, count, "int32") for r in range(comm.size)])
        assert_equal_bits(comm.allgather(x), everyone)
        got = comm.gather(x, 1)
        if got is not None:
            assert_equal_bits(got, everyone)
        out = np.empty_like(x)
        assert_equal_bits(comm.scatter(everyone, 1, out=out) if comm.rank == 1 else comm.scatter(root=1, out=out), x)
        assert_equal_bits(comm.broadcast(x.copy(), comm.size - 1), ranks_data(comm.size - 1, count, "int32"))
        assert_equal_bits(comm.alltoall(everyone), np.tile(x, comm.size))
        splits = [count // (to + 2) for to in range(comm.size)]
        received = np.concatenate(
            [ranks_data(r, sum(splits), "int32")[sum(splits[: comm.rank]) :][: splits[comm.rank]] for r in range(comm.size)]
        )
        assert_equal_bits(comm.alltoall(ranks_data(comm.rank, sum(splits), "int32"), splits=splits), received)
        comm.barrier()
