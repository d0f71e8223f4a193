"""Collectives with a root: reduce, gather, scatter; every root, dtype and length, in place or not, blocking or not."""

from __future__ import annotations

import numpy as np
import pytest
import roundel
from reference import COUNTS, DTYPES, assert_equal_bits, over_ranks, ranks_data
from roundel import ReduceOp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["Sum", "Min", "Max", "Product"])
def test_reduce(comm, op, dtype):
    for i, count in enumerate(COUNTS):
        root = i % comm.size
        x = ranks_data(comm.rank, count, dtype)
        got = comm.reduce(x, root, ReduceOp[op])
        assert_equal_bits(x, ranks_data(comm.rank, count, dtype))
        if comm.rank == root:
            assert_equal_bits(got, over_ranks(op, comm.size, count, dtype))
        else:
            assert got is None


def test_reduce_in_place_into_out_and_scaled(comm):
    for count in COUNTS:
        for root in range(comm.size):
            x = ranks_data(comm.rank, count, "float32")
            out = np.full(count, -1, np.float32)
            handle = comm.reduce_async(x, root, prescale=2.0, postscale=0.5, out=out)
            assert handle.wait() is (out if comm.rank == root else None)
            assert comm.reduce(x, root, out=x) is (x if comm.rank == root else None)
            expected = over_ranks("Sum", comm.size, count, "float32")
            assert_equal_bits(out, expected if comm.rank == root else np.full(count, -1, np.float32))
            assert_equal_bits(x, expected if comm.rank == root else ranks_data(comm.rank, count, "float32"))


def test_16_bit_sums_at_root_round_once(comm):
    x = np.full(30_000, 2048 if comm.rank == 0 else 1, dtype=np.float16)
    got = comm.reduce(x, comm.size - 1)
    if comm.rank == comm.size - 1:
        assert_equal_bits(got, np.full(30_000, np.float16(np.float32(2048 + comm.size - 1))))


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_gather(comm, dtype):
    for i, count in enumerate(COUNTS):
        root = (i + 1) % comm.size
        got = comm.gather(ranks_data(comm.rank, count, dtype), root)
        if comm.rank == root:
            assert_equal_bits(got, np.concatenate([ranks_data(r, count, dtype) for r in range(comm.size)]))
        else:
            assert got is None


def test_gather_of_different_numbers_of_rows_and_from_its_place(comm):
    for base in (0, 1, 1000, 60_000):
        rows = [base * (r % 3) + r for r in range(comm.size)]
        pieces = [ranks_data(r, rows[r] * 2, "float32").reshape(rows[r], 2) for r in range(comm.size)]
        for root in range(comm.size):
            out = np.full((sum(rows), 2), -1, np.float32)
            mine = pieces[comm.rank]
            if comm.rank == root:
                place = out[sum(rows[:root]) : sum(rows[: root + 1])]
                place[:] = mine
                mine = place
            comm.gather_async(mine, root, rows, out=out if comm.rank == root else None).wait()
            if comm.rank == root:
                assert_equal_bits(out, np.concatenate(pieces))


@pytest.mark.parametrize("dtype", ["float64", "int16"])
def test_scatter(comm, dtype):
    for i, count in enumerate(COUNTS):
        root = i % comm.size
        whole = ranks_data(7, count * comm.size, dtype)
        out = np.zeros(count, dtype)
        if comm.rank == root:
            assert comm.scatter(whole, root, out=out) is out
        else:
            assert comm.scatter(root=root, out=out) is out
        assert_equal_bits(out, whole[comm.rank * count : (comm.rank + 1) * count])


def test_scatter_of_different_numbers_of_rows_and_to_its_place(comm):
    for base in (0, 1, 1000, 60_000):
        rows = [base * (r % 3) + r for r in range(comm.size)]
        begin = sum(rows[: comm.rank])
        for root in range(comm.size):
            whole = ranks_data(5, sum(rows) * 2, "float32").reshape(-1, 2)
            mine = np.empty((rows[comm.rank], 2), np.float32)
            if comm.rank == root:
                assert_equal_bits(comm.scatter(whole, root, rows), whole[begin : begin + rows[root]])
                comm.scatter(whole, root, rows, out=whole[begin : begin + rows[root]])
            else:
                comm.scatter(None, root, rows, out=mine)
                assert_equal_bits(mine, whole[begin : begin + rows[comm.rank]])
                comm.scatter_async(None, root, rows, out=mine).wait()
                assert_equal_bits(mine, whole[begin : begin + rows[comm.rank]])


def test_roots_take_turns_without_overtaking(comm):
    for i in range(100):
        x = np.full(50 + 397 * i, i + comm.rank, dtype=np.int32)
        got = comm.reduce(x, i % comm.size)
        if got is not None:
            assert (got == i * comm.size + comm.size * (comm.size - 1) // 2).all()


def test_bad_arguments_are_refused(comm):
    x = np.arange(12.0).reshape(3, 4)
    for call, expected in [
        (lambda: comm.reduce(x, comm.size), "expected a rank from 0"),
        (lambda: comm.reduce(x, comm.rank, out=np.empty(5)), "of 12 elements, got 5"),
        (lambda: comm.gather(x, comm.rank, [1] * (comm.size + 1)), "one number for each"),
        (lambda: comm.gather(x, comm.rank, [1] * comm.size), "an input of 4 elements, got 12"),
        (lambda: comm.scatter(None, (comm.rank + 1) % comm.size) if comm.size > 1 else comm.reduce(x, -1), "expected"),
        (lambda: comm.scatter(np.ones(comm.size + 1), comm.rank, [1] * comm.size), "rows"),
    ]:
        with pytest.raises(roundel.InvalidArgumentError, match=expected):
            call()
    assert_equal_bits(comm.allreduce(np.ones(3)), np.full(3, float(comm.size)))  # still works


def test_what_root_refuses_to_scatter_is_refused_everywhere(comm):
    root = comm.size - 1
    bad = [np.ones(3, np.complex64), np.float32(1), object(), [[1], [1, 2]]]
    for array, reason in zip(bad, ["complex64", "a scalar", "expected|object", "inhomogeneous"], strict=True):
        with pytest.raises(roundel.InvalidArgumentError, match=f"the array of root {root} is refused: .*({reason})"):
            roundel.scatter(array if comm.rank == root else None, root)
    got = roundel.scatter(np.arange(comm.size) if comm.rank == root else None, root)
    assert_equal_bits(got, np.array([comm.rank]))


def test_operations_of_all_sizes_again_and_again(comm):
    """Often enough that shared memory is used again, and that every way of copying is tried."""
    for round in range(8):
        for count in (600, 3000, 8000, 40_000):
            root = round % comm.size
            mine, expected = (ranks_data(r, count, "float32", round) for r in (comm.rank, root))
            x = mine.copy()
            assert_equal_bits(comm.broadcast(x, root), expected)
            assert_equal_bits(comm.allreduce(mine), over_ranks("Sum", comm.size, count, "float32", round))
            total, gathered = comm.reduce(mine, root), comm.gather(mine, root)
            if comm.rank == root:
                assert_equal_bits(total, over_ranks("Sum", comm.size, count, "float32", round))
                assert_equal_bits(gathered, np.concatenate([ranks_data(r, count, "float32", round) for r in range(comm.size)]))
            out = np.empty(count, np.float32)
            comm.scatter(np.tile(mine, comm.size) if comm.rank == root else None, root, out=out)
            assert_equal_bits(out, expected)
