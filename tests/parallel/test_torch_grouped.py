"""Groups, all-to-all, reduce-scatter and sparse all-reduce under Horovod's names: every form, argument and gradient."""

from __future__ import annotations

import time

import pytest
import roundel
import roundel.torch as hvd
import torch
from test_torch_ops import NUMBERS, assert_close, assert_equal, data, reduced

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]
SHAPES = [(), (5, 7), (0,), (4099,)]


def group(rank: int, dtype: str = "float32") -> list[torch.Tensor]:
    return [data(rank, shape, dtype, salt=i) for i, shape in enumerate(SHAPES)]


def group_reduced(op: str, size: int, dtype: str = "float32") -> list[torch.Tensor]:
    return [reduced(op, size, shape, dtype, salt=i) for i, shape in enumerate(SHAPES)]


def assert_all(check, got, expected) -> None:
    assert isinstance(got, list)
    for g, e in zip(got, expected, strict=True):
        check(g, e)


def rows_of(rank: int, size: int, count: int) -> slice:
    """Of reduce-scatter: the first count % size ranks have one more."""
    counts = [count // size + (r < count % size) for r in range(size)]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_grouped_allreduce_in_every_form(comm, dtype):
    mean, total = group_reduced("Average", comm.size, dtype), group_reduced("Sum", comm.size, dtype)
    xs = group(comm.rank, dtype)
    assert_all(assert_close, hvd.grouped_allreduce(xs), mean)
    assert_all(assert_equal, hvd.grouped_allreduce(xs, average=False), total)
    assert_all(assert_equal, hvd.grouped_allreduce(xs, op=hvd.Sum, name="group"), total)
    assert_all(assert_equal, hvd.synchronize(hvd.grouped_allreduce_async(xs, op=hvd.Sum)), total)
    assert_all(assert_equal, xs, group(comm.rank, dtype))
    results = hvd.grouped_allreduce_(xs, op=hvd.Sum)
    assert all(a is b for a, b in zip(results, xs, strict=True))
    assert_all(assert_equal, xs, total)
    ys = group(comm.rank, dtype)
    assert_all(assert_close, hvd.grouped_allreduce_async_(ys).wait(), mean)
    assert_all(assert_close, ys, mean)


def test_grouped_allreduce_of_several_dtypes_operators_scales_and_strides(comm):
    kinds = ("float64", "float32", "bfloat16", "int32")
    xs = [data(comm.rank, (6, 4), kind) for kind in kinds]
    for op in ("Min", "Max", "Product"):
        expected = [reduced(op, comm.size, (6, 4), kind) for kind in kinds]
        assert_all(assert_equal, hvd.grouped_allreduce(xs, op=getattr(hvd, op)), expected)
    totals = [reduced("Sum", comm.size, (6, 4), kind) for kind in kinds]
    scaled = hvd.grouped_allreduce(xs, op=hvd.Sum, prescale_factor=4.0, postscale_factor=0.5)
    assert_all(assert_equal, scaled, [(2 * t).to(t.dtype) for t in totals])
    strided = [x.t() for x in xs]
    assert_all(assert_equal, hvd.grouped_allreduce(strided, op=hvd.Sum), [t.t() for t in totals])
    hvd.grouped_allreduce_(strided, op=hvd.Sum)
    assert_all(assert_equal, xs, totals)
    floats = [data(comm.rank, (6, 4), "float32") for _ in kinds]
    compressed = hvd.grouped_allreduce(floats, op=hvd.Sum, compression=hvd.Compression.fp16)
    assert_all(assert_equal, compressed, [t.float() for t in totals])


def test_gradients_of_grouped_allreduce(comm):
    xs = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    for op, factor in ((hvd.Sum, comm.size), (hvd.Average, 1)):
        first, second = hvd.grouped_allreduce(xs, op=op, name="g")
        ((first * (comm.rank + 1)).sum() + second.sum() * 2).backward()
        assert_close(xs[0].grad, torch.full((3,), sum(range(1, comm.size + 1)) / comm.size * factor))
        assert_close(xs[1].grad, torch.full((2, 2), 2.0 * factor))
        xs[0].grad = xs[1].grad = None


def test_grouped_allgather(comm):
    pieces = [[data(r, (r, 2), "float32"), data(r, (), "int64"), data(r, (3,), "bool")] for r in range(comm.size)]
    expected = [torch.cat([p[0] for p in pieces]), torch.stack([p[1] for p in pieces]), torch.cat([p[2] for p in pieces])]
    assert_all(assert_equal, hvd.grouped_allgather(pieces[comm.rank]), expected)
    assert_all(assert_equal, hvd.grouped_allgather(pieces[comm.rank], name="pieces"), expected)
    assert_all(assert_equal, hvd.synchronize(hvd.grouped_allgather_async(pieces[comm.rank])), expected)


def test_gradients_of_grouped_allgather_are_own_rows_of_the_average(comm):
    x = torch.ones(comm.rank + 1, 2, requires_grad=True)
    y = torch.ones((), requires_grad=True)
    long, short = hvd.grouped_allgather([x, y], name="g")
    weights = torch.arange(len(long), dtype=torch.float32)[:, None] * (comm.rank + 1)
    ((long * weights).sum() + (short * torch.arange(1.0, comm.size + 1)).sum()).backward()
    begin = sum(range(comm.rank + 1))
    mean = torch.arange(begin, begin + comm.rank + 1, dtype=torch.float32)[:, None] * (comm.size + 1) / 2
    assert_close(x.grad, mean.expand(-1, 2))
    assert_close(y.grad, torch.tensor(comm.rank + 1.0))


@pytest.mark.parametrize("dtype", [*NUMBERS, "bool"])
def test_alltoall_divides_evenly_without_splits(comm, dtype):
    x = data(comm.rank, (3 * comm.size, 2), dtype)
    expected = torch.cat([data(r, (3 * comm.size, 2), dtype)[3 * comm.rank : 3 * comm.rank + 3] for r in range(comm.size)])
    got = hvd.alltoall(x)
    assert isinstance(got, torch.Tensor)
    assert_equal(got, expected)
    both, received = hvd.synchronize(hvd.alltoall_async(x, name="a2a"))
    assert_equal(both, expected)
    assert_equal(received, torch.full((comm.size,), 3, dtype=torch.int32))


def test_alltoall_with_splits(comm):
    def splits(rank: int) -> list[int]:  # some none
        return [(rank + i) % 3 for i in range(comm.size)]

    def part(sender: int, receiver: int) -> torch.Tensor:
        rows = splits(sender)
        return data(sender, (sum(rows), 4), "float32")[sum(rows[:receiver]) : sum(rows[: receiver + 1])]

    mine = data(comm.rank, (sum(splits(comm.rank)), 4), "float32")
    expected = torch.cat([part(r, comm.rank) for r in range(comm.size)])
    counts = [splits(r)[comm.rank] for r in range(comm.size)]
    for given, dtype in (
        (splits(comm.rank), torch.int32),
        (tuple(splits(comm.rank)), torch.int32),
        (torch.tensor(splits(comm.rank)), torch.int64),
        (torch.tensor(splits(comm.rank), dtype=torch.int32), torch.int32),
    ):
        got, received = hvd.alltoall(mine, splits=given)
        assert_equal(got, expected)
        assert_equal(received, torch.tensor(counts, dtype=dtype))


def test_gradient_of_alltoall_goes_back_the_way_the_rows_came(comm):
    rows = [(comm.rank + i) % 3 for i in range(comm.size)]
    x = torch.ones(sum(rows), 2, requires_grad=True)
    y, _ = hvd.alltoall(x, splits=rows, name="a2a")
    (y * (comm.rank + 1)).sum().backward()
    receiver = torch.repeat_interleave(torch.arange(1.0, comm.size + 1), torch.tensor(rows))
    assert_close(x.grad, receiver[:, None].expand(-1, 2))
    even = torch.ones(comm.size, requires_grad=True)
    (hvd.alltoall(even) * (comm.rank + 1)).sum().backward()
    assert_close(even.grad, torch.arange(1.0, comm.size + 1))


def test_alltoall_refuses_splits_that_do_not_fit(comm):
    x = torch.ones(comm.size + 1, 2)
    wrong = [[1] * comm.size, [comm.size + 2] + [-1] * (comm.size - 1), [1] * (comm.size + 1), torch.ones(comm.size), [1.5]]
    for splits in wrong:
        with pytest.raises(roundel.InvalidArgumentError, match="alltoall: expected"):
            hvd.alltoall(x, splits=splits)
    with pytest.raises(roundel.InvalidArgumentError, match="scalar"):
        hvd.alltoall(torch.tensor(1.0))
    if comm.size > 1:
        with pytest.raises(roundel.InvalidArgumentError, match="cannot be divided evenly"):
            hvd.alltoall(x)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_reducescatter_of_any_number_of_rows(comm, dtype):
    for rows in (0, 1, comm.size, 2 * comm.size + 1):
        x = data(comm.rank, (rows, 3), dtype)
        mine = rows_of(comm.rank, comm.size, rows)
        mean, total = reduced("Average", comm.size, (rows, 3), dtype)[mine], reduced("Sum", comm.size, (rows, 3), dtype)[mine]
        assert_close(hvd.reducescatter(x), mean)
        assert_equal(hvd.reducescatter(x, op=hvd.Sum, name="rs"), total)
        assert_equal(hvd.synchronize(hvd.reducescatter_async(x, op=hvd.Sum)), total)
        groups = hvd.grouped_reducescatter([x, x], op=hvd.Sum)
        assert_all(assert_equal, groups, [total, total])
        assert_all(assert_close, hvd.grouped_reducescatter_async([x, x]).wait(), [mean, mean])


def test_reducescatter_with_other_operators_scales_and_compression(comm):
    x, mine = data(comm.rank, (7, 2), "float32"), rows_of(comm.rank, comm.size, 7)
    for op in ("Min", "Max", "Product"):
        assert_equal(hvd.reducescatter(x, op=getattr(hvd, op)), reduced(op, comm.size, (7, 2), "float32")[mine])
    total = reduced("Sum", comm.size, (7, 2), "float32")[mine]
    assert_equal(hvd.reducescatter(x, op=hvd.Sum, prescale_factor=4.0, postscale_factor=0.5), 2 * total)
    assert_equal(hvd.reducescatter(x, compression=hvd.Compression.bf16, op=hvd.Sum), total)
    assert_all(assert_equal, hvd.grouped_reducescatter([x], compression=hvd.Compression.fp16, op=hvd.Sum), [total])
    for call in (hvd.reducescatter, hvd.reducescatter_async):
        with pytest.raises(roundel.InvalidArgumentError, match="scalar"):
            call(torch.tensor(1.0))
        with pytest.raises(roundel.InvalidArgumentError, match="Adasum"):
            call(x, op=hvd.Adasum)


def test_gradients_of_reducescatter_are_everybodys(comm):
    weights = torch.arange(1.0, 2 * comm.size + 2)  # of rows: 2 each, and one more on rank 0
    mine = rows_of(comm.rank, comm.size, len(weights))
    for op, factor in ((hvd.Average, 1.0), (hvd.Sum, comm.size)):
        x = torch.ones(len(weights), requires_grad=True)
        y = hvd.reducescatter(x, op=op, name="rs", prescale_factor=2.0, postscale_factor=3.0)
        (y * weights[mine]).sum().backward()
        assert_close(x.grad, weights * factor * 6)
        xs = [torch.ones(len(weights), requires_grad=True) for _ in range(2)]
        first, second = hvd.grouped_reducescatter(xs, op=op)
        (first * weights[mine]).sum().backward(retain_graph=True)
        second.sum().backward()
        assert_close(xs[0].grad, weights * factor)
        assert_close(xs[1].grad, torch.full_like(weights, factor))


def test_sparse_allreduce(comm):
    def entries(rank: int) -> torch.Tensor:
        rows = torch.arange(rank + 1)[None]  # more on higher ranks, some in common
        return torch.sparse_coo_tensor(rows, torch.full((rank + 1, 2), rank + 1.0), (8, 2), check_invariants=True)

    total = sum(entries(r).to_dense() for r in range(comm.size))
    for op, expected in ((hvd.Sum, total), (hvd.Average, total / comm.size), (None, total / comm.size)):
        handle = hvd.sparse_allreduce_async(entries(comm.rank), name="sparse", op=op)
        got = handle()
        assert got.is_sparse and got.shape == (8, 2)
        assert_close(got.to_dense(), expected)
        assert hvd.synchronize(handle) is got and hvd.poll(handle)
    empty = torch.sparse_coo_tensor(torch.empty((1, 0), dtype=torch.int64), torch.empty((0, 2)), (8, 2), check_invariants=True)
    got = hvd.sparse_allreduce_async(empty if comm.rank else entries(0), "sparse", hvd.Sum)()
    assert_close(got.to_dense(), entries(0).to_dense())
    with pytest.raises(roundel.InvalidArgumentError, match="Average or Sum"):
        hvd.sparse_allreduce_async(entries(0), "sparse", hvd.Max)
    with pytest.raises(roundel.InvalidArgumentError, match="sparse COO"):
        hvd.sparse_allreduce_async(torch.ones(3), "sparse", hvd.Sum)


def test_adasum_of_one_and_of_equal_and_orthogonal_tensors(comm):
    equal = torch.tensor([3.0, 4.0, 0.0])
    assert_close(hvd.allreduce(equal, op=hvd.Adasum), equal)  # parallel ones are averaged
    unit = torch.zeros(comm.size)
    unit[comm.rank] = 2.0
    assert_close(hvd.allreduce(unit, op=hvd.Adasum), torch.full((comm.size,), 2.0))  # orthogonal ones are added
    assert_all(assert_close, hvd.grouped_allreduce_([equal.clone(), unit], op=hvd.Adasum), [equal, torch.full_like(unit, 2.0)])
    with pytest.raises(roundel.InvalidArgumentError, match="Adasum"):
        hvd.allreduce(torch.ones(3, dtype=torch.int32), op=hvd.Adasum)


def test_mistakes_in_groups_and_handles(comm):
    for call in (hvd.grouped_allreduce, hvd.grouped_allreduce_, hvd.grouped_allgather, hvd.grouped_reducescatter_async):
        for wrong in ([], torch.ones(3), [torch.ones(3), 1.0], 7):
            with pytest.raises(roundel.InvalidArgumentError, match="expected"):
                call(wrong)
    for call in (hvd.poll, hvd.synchronize):
        with pytest.raises(roundel.InvalidArgumentError, match="expected a handle"):
            call(3)
    assert_equal(hvd.allreduce(torch.ones(3), op=hvd.Sum), torch.full((3,), float(comm.size)))


def test_requests_meet_by_name_in_any_order(comm):
    names = [f"request {i}" for i in range(12)]
    order = names[comm.rank :] + names[: comm.rank]
    handles = {name: hvd.allreduce_async(torch.full((5,), float(names.index(name))), op=hvd.Sum, name=name) for name in order}
    for name in reversed(order):
        assert_equal(hvd.synchronize(handles[name]), torch.full((5,), float(names.index(name) * comm.size)))


def test_barrier_waits_for_all(comm):
    if comm.rank == comm.size - 1:
        time.sleep(0.05)
    arrived = time.monotonic()
    hvd.barrier()
    left = time.monotonic()
    times = hvd.allgather(torch.tensor([[arrived, left]], dtype=torch.float64))
    assert times[:, 1].min() >= times[:, 0].max()  # one clock: ranks of one machine
