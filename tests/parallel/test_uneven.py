"""Different amounts by rank: all-to-all with splits, reduce-scatter with rows, sendrecv, grouped calls."""

from __future__ import annotations

import numpy as np
import pytest
import roundel
from reference import COUNTS, assert_equal_bits, over_ranks, ranks_data
from test_start import outputs, start_by_hand


def splits_of(rank: int, size: int, base: int) -> list[int]:
    return [(base * (rank + 1) + 3 * to) % (base + 2) if (rank + to) % 3 else 0 for to in range(size)]


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bool"])
def test_alltoall_with_splits(comm, dtype):
    for base in (0, 1, 5, 1000, 70_001):
        sends = [splits_of(r, comm.size, base) for r in range(comm.size)]
        data = [ranks_data(r, sum(sends[r]) * 2, dtype).reshape(-1, 2) for r in range(comm.size)]
        received = [sends[r][comm.rank] for r in range(comm.size)]
        begin = [sum(sends[r][: comm.rank]) for r in range(comm.size)]
        expected = np.concatenate([data[r][begin[r] : begin[r] + received[r]] for r in range(comm.size)])
        mine = data[comm.rank]
        assert_equal_bits(comm.alltoall(mine, splits=sends[comm.rank]), expected)
        out = np.zeros_like(expected)
        assert comm.alltoall_async(mine, out, splits=sends[comm.rank], received_splits=received).wait() is out
        assert_equal_bits(out, expected)


def test_alltoall_with_bad_splits_is_refused(comm):
    x = np.ones(comm.size)
    for call, expected in [
        (lambda: comm.alltoall(x, splits=[1] * (comm.size + 1)), "one number for each"),
        (lambda: comm.alltoall_async(x, splits=[1] * comm.size), "received_splits too"),
        (lambda: comm.alltoall_async(x, splits=[2] * comm.size, received_splits=[1] * comm.size), "sum of"),
        (lambda: comm.alltoall(np.ones(comm.size + 1)) if comm.size > 1 else comm.alltoall(3.0), "expected"),
    ]:
        with pytest.raises(roundel.InvalidArgumentError, match=expected):
            call()
    assert_equal_bits(comm.alltoall(x), x)


@pytest.mark.ends_communicator
def test_splits_that_do_not_agree_are_a_mismatch(comm):
    if comm.size == 1:
        return
    received = [1] * comm.size
    if comm.rank == 0:
        received[1] = 2  # rank 1 sends 1
    with pytest.raises(roundel.MismatchError, match=r"expected 2 elements from rank 1, which sends 1|rank 0"):
        comm.alltoall_async(np.ones(comm.size), splits=[1] * comm.size, received_splits=received).wait()
        comm.barrier()


def test_reduce_scatter_with_rows(comm):
    for base in (0, 1, 1000, 60_000):
        rows = [base * ((r + 1) % 3) + r for r in range(comm.size)]
        x = ranks_data(comm.rank, sum(rows) * 3, "float32").reshape(-1, 3)
        expected = over_ranks("Sum", comm.size, sum(rows) * 3, "float32").reshape(-1, 3)
        begin = sum(rows[: comm.rank])
        assert_equal_bits(comm.reduce_scatter(x, rows=rows), expected[begin : begin + rows[comm.rank]])
    with pytest.raises(roundel.InvalidArgumentError, match="a sum of 5"):
        comm.reduce_scatter(np.ones(5), rows=[2] * comm.size if comm.size != 2 else [1, 1])


def test_sendrecv_around_the_ring_and_with_oneself_refused(comm):
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        with pytest.raises(roundel.InvalidArgumentError, match="another rank"):
            comm.sendrecv(np.ones(1), 0, np.ones(1), 0)
        return
    for count in COUNTS:
        y = np.empty(count, np.int16)
        assert comm.sendrecv(ranks_data(comm.rank, count, "int16"), following, y, preceding) is y
        assert_equal_bits(y, ranks_data(preceding, count, "int16"))
        comm.sendrecv_async(ranks_data(comm.rank, count, "int16"), preceding, y, following).wait()
        assert_equal_bits(y, ranks_data(following, count, "int16"))


def group(rank: int) -> list[np.ndarray]:
    shapes = [(0,), (), (7,), (3, 5), (1000,), (300_000,), (400_000,), (2, 0, 3)]
    return [
        ranks_data(rank, int(np.prod(shape)), dtype, salt=i).reshape(shape)
        for i, shape in enumerate(shapes)
        for dtype in ("float32", "int64", "float16")
    ]


def test_grouped_allreduce(comm):
    xs = group(comm.rank)
    expected = [over_ranks("Sum", comm.size, x.size, str(x.dtype), salt=i // 3).reshape(x.shape) for i, x in enumerate(xs)]
    for got, want in zip(comm.grouped_allreduce(xs, name="all"), expected, strict=True):
        assert_equal_bits(got, want)
    assert_equal_bits(xs[9], group(comm.rank)[9])
    results = comm.grouped_allreduce_async(xs, outs=xs).wait()
    assert all(result is x for result, x in zip(results, xs, strict=True))
    for got, want in zip(xs, expected, strict=True):
        assert_equal_bits(got, want)


def test_grouped_gathers_and_scatters(comm):
    xs = [ranks_data(comm.rank, n * comm.size, "int32").reshape(-1, 1) for n in (0, 1, 30, 40_000)]
    for x, got in zip(xs, comm.grouped_allgather(xs, name="g"), strict=True):
        assert_equal_bits(got, np.concatenate([ranks_data(r, x.size, "int32") for r in range(comm.size)]).reshape(-1, 1))
    for x, got in zip(xs, comm.grouped_reduce_scatter_async(xs).wait(), strict=True):
        each = len(x) // comm.size
        expected = over_ranks("Sum", comm.size, x.size, "int32").reshape(-1, 1)
        assert_equal_bits(got, expected[comm.rank * each : (comm.rank + 1) * each])
    for call in (comm.grouped_allreduce, comm.grouped_allgather, comm.grouped_reduce_scatter):
        with pytest.raises(roundel.InvalidArgumentError, match="at least one array"):
            call([])


@pytest.mark.ends_communicator
def test_groups_that_differ_are_a_mismatch(comm):
    if comm.size == 1:
        return
    with pytest.raises(roundel.MismatchError):
        comm.grouped_allreduce([np.ones(3), np.ones(5)] if comm.rank else [np.ones(5), np.ones(3)])
        comm.barrier()


def test_library_allocated_arrays_have_shape_and_dtype(comm):
    import torch

    x = comm.empty((3, 4), np.int16)
    assert (x.shape, x.dtype, x.flags.c_contiguous) == ((3, 4), np.int16, True)
    x[:] = comm.rank
    assert_equal_bits(comm.allreduce(x, out=x), np.full((3, 4), comm.size * (comm.size - 1) // 2, np.int16))
    t = comm.empty(1000, torch.bfloat16)
    assert (tuple(t.shape), t.dtype) == ((1000,), torch.bfloat16)
    t.fill_(2)
    assert (comm.allreduce(t, out=t) == 2 * comm.size).all()
    assert comm.empty(()).shape == () and comm.empty((0, 5)).size == 0


def test_outs_of_a_group_are_checked_one_by_one(comm):
    xs = [np.full(4, comm.rank, np.float32) for _ in range(2)]
    buffer = np.zeros(6, np.float32)
    for bad, expected in [
        (np.zeros(4, np.float64), "one dtype"),
        (np.zeros(2, np.float16), "of 4 elements, got 2"),
        (np.zeros(5, np.float32), "of 4 elements, got 5"),
    ]:
        outs = [np.full(4, -1, np.float32), bad]
        with pytest.raises(roundel.InvalidArgumentError, match=expected):
            comm.grouped_allreduce(xs, outs=outs)
        assert (outs[0] == -1).all() and (bad == 0).all()
    with pytest.raises(roundel.InvalidArgumentError, match="overlap"):
        comm.grouped_allreduce([buffer[:4]], outs=[buffer[2:]])
    assert_equal_bits(comm.grouped_allreduce(xs)[1], np.full(4, comm.size * (comm.size - 1) / 2, np.float32))


def test_a_call_of_several_operations_is_refused_as_a_whole(comm):
    x = np.full(3, comm.rank + 1, np.float32)
    with pytest.raises(roundel.InvalidArgumentError, match="bool has no average"):
        comm.grouped_allreduce([x, np.ones(3, bool)], roundel.Average, outs=[x, np.ones(3, bool)])
    assert (x == comm.rank + 1).all()
    if comm.size == 1:
        return
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    untouched, y = np.zeros(3, np.float32), np.zeros(3, np.float32)
    for start in (comm.sendrecv, comm.sendrecv_async):
        with pytest.raises(roundel.InvalidArgumentError, match="expected a rank from 0"):
            start(x, -1, untouched, preceding)
    comm.sendrecv(x, following, y, preceding, timeout=5)  # no receive was left behind that would take this
    assert (y == preceding + 1).all() and (untouched == 0).all()


def test_bad_splits_of_one_rank_are_refused_before_the_others_are_asked(comm):
    ones, out = [1] * comm.size, np.zeros(comm.size, np.float32)
    if comm.rank == 0:
        for call, expected in [
            (lambda: comm.alltoall(np.ones(comm.size), splits=[2] * comm.size), "a sum of"),
            (lambda: comm.alltoall(np.ones((comm.size, 4))[:, ::2], splits=ones), "C-contiguous"),
            (lambda: comm.alltoall(np.ones(comm.size, np.complex64), splits=ones), "expected"),
            (lambda: comm.alltoall(np.ones(comm.size), out, splits=ones), "one dtype"),
            (lambda: comm.alltoall(out, out, splits=ones), "overlap"),
        ]:
            with pytest.raises(roundel.InvalidArgumentError, match=expected):
                call()
        long = np.zeros(comm.size + 1)  # seen only when the others have said how much they send
        with pytest.raises(roundel.InvalidArgumentError, match=f"expected {comm.size} elements, got {comm.size + 1}"):
            comm.alltoall(np.ones(comm.size), long, splits=ones)
        assert (long == 0).all()
    else:
        assert_equal_bits(comm.alltoall(np.ones(comm.size), splits=ones), np.ones(comm.size))
    assert_equal_bits(comm.alltoall(np.ones(comm.size), splits=ones), np.ones(comm.size))


def test_an_array_that_one_rank_refuses_disturbs_nobody(comm):
    if comm.rank == comm.size - 1:
        for call in (roundel.allgather, roundel.gather):
            with pytest.raises(roundel.InvalidArgumentError, match="complex64"):
                call(np.ones(3, np.complex64))
        with pytest.raises(roundel.InvalidArgumentError, match="expected a rank from 0"):
            roundel.gather(np.ones(3), comm.size)
    assert_equal_bits(roundel.allgather(np.ones(3)), np.ones(3 * comm.size))


@pytest.mark.ends_communicator
@pytest.mark.parametrize("what", ["alltoall", "gather", "scatter"])
def test_steps_of_the_library_do_not_meet_unnamed_operations(comm, what):
    if comm.size == 1:
        return
    theirs = np.ones(comm.size, np.int64)
    with pytest.raises(roundel.MismatchError):
        if what == "alltoall":
            comm.alltoall(theirs, splits=[1] * comm.size) if comm.rank == 0 else comm.alltoall(theirs)
        elif what == "scatter":
            roundel.scatter(theirs) if comm.rank == 0 else comm.broadcast(theirs[:1].copy())
        else:
            roundel.gather(theirs) if comm.rank == 0 else comm.allgather(theirs[:1].copy())
        if comm.rank == 0:
            comm.barrier()  # a root that only sends learns it from the next operation


@pytest.mark.ends_communicator
def test_the_places_of_dtypes_in_a_group_are_compared(comm):
    if comm.size == 1:
        return
    xs = [np.ones(3, np.float32), np.ones(3, np.float16)]
    with pytest.raises(roundel.MismatchError):
        comm.grouped_allreduce(xs if comm.rank else xs[::-1])
        comm.barrier()


def test_groups_travel_together_when_the_arena_is_full(tmp_path):
    program = """
import numpy as np, roundel
roundel.init()
comm = roundel.communicator()
taken = comm.allocate(60000)
xs = [np.full(20000, i, np.float32) for i in range(4)]
for _ in range(3):
    for i, y in enumerate(comm.grouped_allreduce(xs)):
        assert (y == 2 * i).all()
del taken
assert (comm.grouped_allreduce([np.ones(3), np.ones(5)])[1] == 2).all()
print("fine")
"""
    small = {"ROUNDEL_ARENA_BYTES": "64k"}
    for code, out, err in outputs(start_by_hand(2, program, tmp_path, rank0=small, rank1=small)):
        assert code == 0 and out == "fine\n", err
