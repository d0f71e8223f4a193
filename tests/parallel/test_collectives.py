"""Every collective, dtype, operator and length, over every transport at sizes 1 to 4, against arithmetic, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import roundel
from reference import COUNTS, DTYPES, assert_equal_bits, assert_same_on_all_ranks, over_ranks, ranks_data
from roundel import ReduceOp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["Sum", "Average", "Min", "Max", "Product"])
def test_allreduce(comm, op, dtype):
    if dtype == "bool" and op == "Average":
        return
    for count in COUNTS:
        x = ranks_data(comm.rank, count, dtype)
        before = x.copy()
        expected = over_ranks(op, comm.size, count, dtype)
        if dtype.startswith("float") and op == "Average":  # one rounding, of sum * (1 / size)
            assert np.allclose(comm.allreduce(x, ReduceOp[op]), expected, rtol=1e-3 if dtype == "float16" else 1e-6)
        else:
            assert_equal_bits(comm.allreduce(x, ReduceOp[op]), expected)
        assert_equal_bits(x, before)


def test_allreduce_in_place_and_into_out(comm):
    for count in COUNTS:
        expected = over_ranks("Sum", comm.size, count, "int32")
        x = ranks_data(comm.rank, count, "int32")
        assert comm.allreduce(x, out=x) is x
        assert_equal_bits(x, expected)
        out = np.full(count, -1, dtype=np.int32)
        assert comm.allreduce(ranks_data(comm.rank, count, "int32"), out=out) is out
        assert_equal_bits(out, expected)


def test_allreduce_of_library_allocated_buffers(comm):
    for count in COUNTS:
        x = comm.allocate(count * 4).view(np.float32)
        x[:] = ranks_data(comm.rank, count, "float32")
        comm.allreduce(x, out=x, prescale=2.0)
        assert_equal_bits(x, 2 * over_ranks("Sum", comm.size, count, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_allreduce_again_and_again(comm, dtype):
    """Often enough that ranks of a host have tried to read each other's memory, and chosen."""
    count = 600_011
    expected = over_ranks("Sum", comm.size, count, dtype)
    mine = ranks_data(comm.rank, count, dtype)
    x, out = mine.copy(), np.empty_like(mine)
    mixed = comm.empty(count, dtype) if comm.rank % 2 == 0 else np.empty_like(mine)
    for round in range(20):
        into = (x, out, mixed)[round % 3]
        x[:] = mine
        into[:] = mine if into is x else 0
        assert comm.allreduce(x, out=into) is into
        assert_equal_bits(into, expected)


def test_allreduce_when_only_some_ranks_have_library_allocated_buffers(comm):
    for count in (1, 400, 1000, 8000, 100_000):
        x = comm.allocate(count * 4).view(np.float32) if comm.rank % 2 == 0 else np.empty(count, np.float32)
        x[:] = ranks_data(comm.rank, count, "float32")
        comm.allreduce(x, out=x, prescale=3.0)
        assert_equal_bits(x, 3 * over_ranks("Sum", comm.size, count, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_allreduce_scales_before_and_after(comm, dtype):
    for count in COUNTS:
        x = ranks_data(comm.rank, count, dtype)
        got = comm.allreduce(x, prescale=2.0, postscale=0.5)
        assert_equal_bits(got, over_ranks("Sum", comm.size, count, dtype))


def test_16_bit_sums_round_once(comm):
    # 2048 + 1 is 2048 in float16: rounding at every hop would lose every one; one rounding of the sum keeps them in pairs.
    x = np.full(30_000, 2048 if comm.rank == 0 else 1, dtype=np.float16)
    expected = np.float16(np.float32(2048 + comm.size - 1))
    assert_equal_bits(comm.allreduce(x), np.full(30_000, expected, dtype=np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_random_sums_are_the_same_bits_on_every_rank_and_every_run(comm, dtype):
    for count in COUNTS:
        x = np.random.default_rng(comm.rank).standard_normal(count).astype(dtype)
        first = comm.allreduce(x)
        assert_same_on_all_ranks(comm, first)
        assert_equal_bits(comm.allreduce(x), first)
        everyone = np.stack([np.random.default_rng(r).standard_normal(count).astype(dtype) for r in range(comm.size)])
        exact = everyone.astype(np.float64).sum(0)
        assert np.allclose(first, exact, rtol=2e-3 if dtype == "float16" else 1e-5, atol=2e-3 if dtype == "float16" else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_reduce_scatter_keeps_own_rows(comm, dtype):
    for rows in (0, 1, comm.size - 1, comm.size, 3 * comm.size + 2, 5001):
        for width in (1, 3, 40):
            x = ranks_data(comm.rank, rows * width, dtype).reshape(rows, width)
            expected = over_ranks("Sum", comm.size, rows * width, dtype).reshape(rows, width)
            counts = [rows // comm.size + (r < rows % comm.size) for r in range(comm.size)]
            begin = sum(counts[: comm.rank])
            assert_equal_bits(comm.reduce_scatter(x), expected[begin : begin + counts[comm.rank]])


@pytest.mark.parametrize("dtype", ["float64", "int16", "bool"])
def test_allgather(comm, dtype):
    for count in COUNTS:
        expected = np.concatenate([ranks_data(r, count, dtype) for r in range(comm.size)])
        assert_equal_bits(comm.allgather(ranks_data(comm.rank, count, dtype)), expected)


def test_allgather_of_different_numbers_of_rows(comm):
    for base in (0, 1, 1000, 60_000):
        rows = [base * (r % 3) + r for r in range(comm.size)]
        pieces = [ranks_data(r, rows[r] * 2, "float32").reshape(rows[r], 2) for r in range(comm.size)]
        assert_equal_bits(comm.allgather(pieces[comm.rank], rows), np.concatenate(pieces))


def test_allgather_from_its_place_in_the_result(comm):
    count = 50_000
    out = np.zeros((comm.size, count), dtype=np.float32)
    out[comm.rank] = ranks_data(comm.rank, count, "float32")
    comm.allgather(out[comm.rank : comm.rank + 1], out=out)
    assert_equal_bits(out, np.stack([ranks_data(r, count, "float32") for r in range(comm.size)]))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_broadcast_from_every_root(comm, dtype):
    for count in COUNTS:
        for root in range(comm.size):
            x = ranks_data(comm.rank, count, dtype, salt=root)
            assert comm.broadcast(x, root) is x
            assert_equal_bits(x, ranks_data(root, count, dtype, salt=root))


def test_many_broadcasts_in_a_row_do_not_overtake_each_other(comm):
    for i in range(200):
        x = np.full(1000 + 97 * i, i if comm.rank == 0 else -1, dtype=np.int32)
        assert (comm.broadcast(x, 0) == i).all()


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_alltoall(comm, dtype):
    for count in COUNTS:
        x = ranks_data(comm.rank, count * comm.size, dtype)
        expected = np.concatenate(
            [ranks_data(r, count * comm.size, dtype)[count * comm.rank :][:count] for r in range(comm.size)]
        )
        assert_equal_bits(comm.alltoall(x), expected)


def test_barrier_waits_for_the_last(comm):
    import time

    for late in range(comm.size):
        if comm.rank == late:
            time.sleep(0.05)
        entered = np.array([time.monotonic_ns()])
        comm.barrier()
        left = time.monotonic_ns()
        assert left >= comm.allgather(entered).max()  # one clock: all ranks are on one machine


def test_send_and_recv_around_the_ring(comm):
    if comm.size == 1:
        return
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for count in COUNTS:
        x = ranks_data(comm.rank, count, "float64")
        y = np.empty_like(x)
        pending = comm.recv_async(y, preceding)  # everyone receives first: only works when transfers run side by side
        comm.send(x, following)
        pending.wait()
        assert_equal_bits(y, ranks_data(preceding, count, "float64"))


def test_transfers_run_beside_collectives(comm):
    if comm.size == 1:
        return
    peer = comm.rank ^ 1
    x, y = ranks_data(comm.rank, 3_000_000, "float32"), np.empty(3_000_000, dtype=np.float32)
    if peer < comm.size:
        received, sent = comm.recv_async(y, peer), comm.send_async(x, peer)
    for _ in range(3):
        assert_equal_bits(comm.allreduce(ranks_data(comm.rank, 90_000, "int32")), over_ranks("Sum", comm.size, 90_000, "int32"))
    if peer < comm.size:
        received.wait(), sent.wait()
        assert_equal_bits(y, ranks_data(peer, 3_000_000, "float32"))


def test_asynchronous_operations_finish_in_any_order_of_waiting(comm):
    handles, expected = [], []
    for i in range(60):
        count = [3, 3000, 30_000][i % 3] + i
        if i % 4 == 3:
            handles.append(comm.broadcast_async(ranks_data(comm.rank, count, "int16"), i % comm.size))
            expected.append(ranks_data(i % comm.size, count, "int16"))
        else:
            handles.append(comm.allreduce_async(ranks_data(comm.rank, count, "int16", i), name=f"tensor {i}"))
            expected.append(over_ranks("Sum", comm.size, count, "int16", i))
    assert_equal_bits(comm.allreduce(np.ones(5)), np.full(5, float(comm.size)))  # a blocking call queues behind them
    for handle, want in reversed(list(zip(handles, expected, strict=True))):
        assert_equal_bits(handle.wait(), want)
        assert handle.done()


def test_dropped_handles_still_finish(comm):
    for i in range(20):
        comm.allreduce_async(np.full(50_000, i, dtype=np.float32))
    assert_equal_bits(comm.allreduce(np.ones(3)), np.full(3, float(comm.size)))


def test_random_programs_agree_with_arithmetic(comm):
    random = np.random.default_rng(42)  # the same program on every rank
    for _ in range(60):
        kind, count, root = random.integers(4), int(random.integers(1, 40_000)), int(random.integers(comm.size))
        dtype = DTYPES[random.integers(len(DTYPES))]
        if kind == 0:
            assert_equal_bits(
                comm.allreduce(ranks_data(comm.rank, count, dtype)),
                over_ranks("Sum", comm.size, count, dtype) if dtype != "bool" else over_ranks("Max", comm.size, count, dtype),
            )
        elif kind == 1:
            assert_equal_bits(comm.broadcast(ranks_data(comm.rank, count, dtype), root), ranks_data(root, count, dtype))
        elif kind == 2:
            assert_equal_bits(
                comm.allgather(ranks_data(comm.rank, count, dtype)),
                np.concatenate([ranks_data(r, count, dtype) for r in range(comm.size)]),
            )
        else:
            comm.barrier()


def test_bad_arguments_are_refused_before_anything_happens(comm):
    x = np.arange(12.0).reshape(3, 4)
    for call, expected in [
        (lambda: comm.allreduce(x.T), "C-contiguous"),
        (lambda: comm.allreduce(x, out=np.empty(5)), "of 12 elements, got 5"),
        (lambda: comm.allreduce(x, out=np.empty((3, 4), np.float32)), "one dtype"),
        (lambda: comm.allreduce(x.astype(complex)), "expected float32"),
        (lambda: comm.allreduce([1, 2]), "expected an array"),
        (lambda: comm.allreduce(x, 99), "op: expected"),
        (lambda: comm.allreduce(np.ones(2, bool), ReduceOp.Average), "bool has no average"),
        (lambda: comm.broadcast(x, comm.size), "expected a rank from 0"),
        (lambda: comm.allgather(x, [1] * (comm.size + 1)), "one number for each"),
        (lambda: comm.send(x, comm.rank), "another rank"),
        (lambda: comm.allreduce(x.reshape(-1)[:6], out=x.reshape(-1)[3:9]), "overlap"),
    ]:
        with pytest.raises(roundel.InvalidArgumentError, match=expected):
            call()
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(roundel.InvalidArgumentError, match="writable"):
        comm.allreduce(frozen, out=frozen)
    assert_equal_bits(comm.allreduce(frozen), np.full(3, float(comm.size)))  # still works
