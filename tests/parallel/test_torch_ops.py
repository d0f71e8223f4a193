"""Collectives on torch tensors under Horovod's names: every dtype, strides, gradients, handles, compression, mistakes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import roundel
import roundel.torch as hvd
import torch
from reference import over_ranks, ranks_data

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("tcp", 2), ("hosts", 4)]
DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"]
NUMBERS = [dtype for dtype in DTYPES if dtype != "bool"]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5, 7), (3, 4099), (150_001,)]


def data(rank: int, shape: tuple[int, ...], dtype: str, salt: int = 0) -> torch.Tensor:
    """ranks_data as a torch tensor; small integers are exact in bfloat16 too."""
    kind = "int64" if dtype == "bfloat16" else dtype
    values = ranks_data(rank, int(np.prod(shape)), kind, salt)
    return torch.from_numpy(values).to(getattr(torch, dtype)).reshape(shape)


def reduced(op: str, size: int, shape: tuple[int, ...], dtype: str, salt: int = 0) -> torch.Tensor:
    kind = "float64" if dtype == "bfloat16" else dtype
    values = over_ranks(op, size, int(np.prod(shape)), kind, salt)
    return torch.from_numpy(values).to(getattr(torch, dtype)).reshape(shape)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        f"{got.dtype} {got.shape}, {expected.dtype} {expected.shape}"
    )
    assert torch.equal(got, expected), f"{got} is not {expected}"


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype.is_floating_point:
        torch.testing.assert_close(got, expected)
    else:
        assert_equal(got, expected)


def strided(rank: int, dtype: str = "float32") -> list[torch.Tensor]:
    """Tensors that are not contiguous, with equal content on no two ranks."""

    def x():
        return data(rank, (6, 8), dtype)

    return [x().t(), x()[::2], x()[:, 3], x()[1:4, 2:5], data(rank, (2, 3, 4, 4), dtype).to(memory_format=torch.channels_last)]


def test_ranks_are_the_communicators(comm):
    assert (hvd.rank(), hvd.size()) == (comm.rank, comm.size)
    assert 0 <= hvd.local_rank() < hvd.local_size() <= comm.size
    assert 0 <= hvd.cross_rank() < hvd.cross_size() <= comm.size
    assert hvd.is_initialized()
    hvd.init()  # changes nothing
    assert hvd.rank() == comm.rank


@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce_sums_exactly(comm, dtype):
    for shape in SHAPES:
        x = data(comm.rank, shape, dtype)
        before = x.clone()
        assert_equal(hvd.allreduce(x, op=hvd.Sum), reduced("Sum", comm.size, shape, dtype))
        assert_equal(x, before)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_allreduce_averages_unless_told_otherwise(comm, dtype):
    for shape in SHAPES:
        x, mean = data(comm.rank, shape, dtype), reduced("Average", comm.size, shape, dtype)
        assert_close(hvd.allreduce(x), mean)
        assert_close(hvd.allreduce(x, average=True), mean)
        assert_close(hvd.allreduce(x, op=hvd.Average), mean)
        assert_equal(hvd.allreduce(x, average=False), reduced("Sum", comm.size, shape, dtype))
        assert_close(hvd.synchronize(hvd.allreduce_async(x)), mean)
        assert_close(hvd.allreduce_(x), mean)
        assert_close(x, mean)


@pytest.mark.parametrize("op", ["Min", "Max", "Product"])
def test_allreduce_with_other_operators(comm, op):
    for dtype in ("float32", "bfloat16", "int32"):
        assert_equal(hvd.allreduce(data(comm.rank, (5, 7), dtype), op=hvd.__dict__[op]), reduced(op, comm.size, (5, 7), dtype))


def test_average_and_op_together_are_refused(comm):
    x = torch.ones(3)
    for call in (hvd.allreduce, hvd.allreduce_, hvd.allreduce_async, hvd.allreduce_async_):
        for average in (True, False):
            with pytest.raises(ValueError, match="not both"):
                call(x, average=average, op=hvd.Sum)
    assert_equal(hvd.allreduce(x, op=hvd.Sum), torch.full((3,), float(comm.size)))


def test_allreduce_scales_before_and_after(comm):
    for dtype in ("float32", "bfloat16", "float64"):
        x, total = data(comm.rank, (100,), dtype), reduced("Sum", comm.size, (100,), dtype)
        assert_equal(hvd.allreduce(x, op=hvd.Sum, prescale_factor=4.0, postscale_factor=0.5), 2 * total)
        assert_equal(hvd.allreduce_(x.clone(), op=hvd.Sum, prescale_factor=0.5), total / 2)
        assert_equal(hvd.allreduce_async(x, op=hvd.Sum, postscale_factor=2.0).wait(), 2 * total)
    fives = torch.full((10,), 5, dtype=torch.int32)
    assert_equal(hvd.allreduce(fives, op=hvd.Max, prescale_factor=2.0), torch.full((10,), 10, dtype=torch.int32))


def test_tensors_with_any_strides(comm):
    for mine, everyones in zip(strided(comm.rank), zip(*(strided(r) for r in range(comm.size)), strict=True), strict=True):
        before, total = mine.clone(), torch.stack(everyones).sum(0)
        assert_equal(hvd.allreduce(mine, op=hvd.Sum), total)
        assert_equal(hvd.broadcast(mine, comm.size - 1), everyones[-1])
        assert_equal(hvd.allgather(mine), torch.cat(everyones))
        assert_equal(mine, before)
        strides = mine.stride()
        assert hvd.allreduce_(mine, op=hvd.Sum) is mine
        assert_equal(mine, total)
        assert mine.stride() == strides
        mine.copy_(before)
        assert hvd.broadcast_(mine, 0) is mine
        assert_equal(mine, everyones[0])


def test_in_place_operations_on_a_view_leave_the_rest_alone(comm):
    x = torch.zeros(6, 8)
    hvd.allreduce_(x[1:5:2, 1:7:3].fill_(1.0), op=hvd.Sum)
    assert x.sum() == 4 * comm.size
    assert x[1, 1] == x[3, 4] == comm.size


def test_lazily_negated_tensors_arrive_negated(comm):
    for count in (1, 4):  # a single element is contiguous, and still negated
        x = torch.full((count,), 1 + 2j).conj().imag
        assert x.is_neg()
        assert_equal(hvd.allreduce(x, op=hvd.Max), torch.full((count,), -2.0))
        hvd.allreduce_(x, op=hvd.Sum)
        assert_equal(x.clone(), torch.full((count,), -2.0 * comm.size))


def test_in_place_on_leaves_that_require_grad(comm):
    p = torch.nn.Parameter(data(comm.rank, (5, 7), "float32"))
    assert hvd.allreduce_(p, op=hvd.Sum) is p
    assert_equal(p.detach(), reduced("Sum", comm.size, (5, 7), "float32"))
    p = torch.nn.Parameter(data(comm.rank, (5, 7), "float32"))
    assert hvd.synchronize(hvd.broadcast_async_(p, 0)) is p
    assert_equal(p.detach(), data(0, (5, 7), "float32"))
    assert p.requires_grad and p.is_leaf


def test_autograd_notices_in_place_operations(comm):
    for change in (lambda x: hvd.allreduce_(x), lambda x: hvd.broadcast_(x, 0)):
        x = torch.ones(3)
        w = torch.ones(3, requires_grad=True)
        y = (w * x).sum()  # saves x
        change(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_inside_inference_mode(comm):
    with torch.inference_mode():
        x = data(comm.rank, (5, 7), "float32")
        assert_equal(hvd.allreduce(x, op=hvd.Sum), reduced("Sum", comm.size, (5, 7), "float32"))
        y = torch.full((3,), float(comm.rank))
        assert_equal(hvd.broadcast_(y, comm.size - 1), torch.full((3,), comm.size - 1.0))
    assert_equal(hvd.allreduce_(y, op=hvd.Max), torch.full((3,), comm.size - 1.0))  # an inference tensor outside


@pytest.mark.parametrize("dtype", DTYPES)
def test_allgather_of_different_numbers_of_rows(comm, dtype):
    for rows, rest in [
        (lambda r: 3, (2,)),
        (lambda r: r, (4,)),
        (lambda r: 2 * (r % 2), ()),
        (lambda r: 0, (5,)),
        (lambda r: 1, (0,)),
    ]:
        pieces = [data(r, (rows(r), *rest), dtype) for r in range(comm.size)]
        assert_equal(hvd.allgather(pieces[comm.rank]), torch.cat(pieces))
        assert_equal(hvd.synchronize(hvd.allgather_async(pieces[comm.rank])), torch.cat(pieces))


def test_allgather_of_scalars_is_a_vector(comm):
    assert_equal(hvd.allgather(torch.tensor(comm.rank)), torch.arange(comm.size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_from_every_root(comm, dtype):
    for shape in SHAPES:
        for root in range(comm.size):
            x = data(comm.rank, shape, dtype, salt=root)
            before, expected = x.clone(), data(root, shape, dtype, salt=root)
            assert_equal(hvd.broadcast(x, root), expected)
            assert_equal(hvd.broadcast_async(x, root).wait(), expected)
            assert_equal(x, before)
            assert hvd.broadcast_(x, root) is x
            assert_equal(x, expected)


def test_broadcasts_result_is_not_its_argument(comm):
    for x in (torch.ones(3), torch.ones(4, 4).t(), torch.tensor(1.0)):
        y = hvd.broadcast(x, 0)
        y.zero_()
        assert x.sum() == x.numel()


def test_gradient_of_allreduce_is_allreduced(comm):
    for op, expected in [(hvd.Sum, sum(range(1, comm.size + 1))), (hvd.Average, (comm.size + 1) / 2)]:
        x = torch.ones(2, 3, requires_grad=True)
        (hvd.allreduce(x, op=op, name="x") * (comm.rank + 1)).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((2, 3), float(expected)))


def test_gradient_of_a_scaled_allreduce_is_scaled_alike(comm):
    x = torch.ones(3, requires_grad=True)
    hvd.allreduce(x, op=hvd.Sum, prescale_factor=2.0, postscale_factor=4.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 8.0 * comm.size))


def test_second_derivatives_of_allreduce(comm):
    x = torch.full((3,), 2.0, requires_grad=True)
    y = hvd.allreduce(x**2, op=hvd.Average) ** 2  # x^4, where x is the same on all ranks
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, torch.full((3,), 4.0 * 2**3))
    torch.testing.assert_close(second, torch.full((3,), 12.0 * 2**2))


def test_second_derivatives_of_allgather_and_broadcast(comm):
    for gather in (lambda x: hvd.allgather(x)[:3], lambda x: hvd.broadcast(x, 0)):
        x = torch.full((3,), 2.0, requires_grad=True)
        y = gather(x**2) ** 2
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        root = float(comm.rank == 0)
        torch.testing.assert_close(first, torch.full((3,), root * 4 * 2**3))
        # d/dx of (mean over ranks of 2 y) * 2 x, where all y depend on root's x and another mean is taken on the way back
        torch.testing.assert_close(second, torch.full((3,), root * (4 * 2**2 + 8 * 2**2 / comm.size)))


def test_gradient_goes_through_compression(comm):
    x = torch.ones(3, requires_grad=True)
    y = hvd.allreduce(x, compression=hvd.Compression.bf16, op=hvd.Sum)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert_equal(x.grad, torch.full((3,), float(comm.size)))


def test_gradient_of_allgather_is_own_rows_of_the_average(comm):
    rows = [2 * r + 1 for r in range(comm.size)]
    x = torch.ones(rows[comm.rank], 2, requires_grad=True)
    y = hvd.allgather(x, name="rows")
    weights = torch.arange(sum(rows), dtype=torch.float32).reshape(-1, 1) * (comm.rank + 1)
    (y * weights).sum().backward()
    begin = sum(rows[: comm.rank])
    mean = torch.arange(sum(rows), dtype=torch.float32).reshape(-1, 1) * (comm.size + 1) / 2
    torch.testing.assert_close(x.grad, mean[begin : begin + rows[comm.rank]].expand(-1, 2))


def test_gradient_of_allgather_of_scalars(comm):
    x = torch.tensor(1.0, requires_grad=True)
    (hvd.allgather(x) * torch.arange(1.0, comm.size + 1)).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor(comm.rank + 1.0))


def test_gradient_of_broadcast_is_averaged_to_root(comm):
    for root in range(comm.size):
        x = torch.ones(4, requires_grad=True)
        (hvd.broadcast(x, root) * (comm.rank + 1)).sum().backward()
        expected = (comm.size + 1) / 2 if comm.rank == root else 0.0
        torch.testing.assert_close(x.grad, torch.full((4,), expected))


def test_results_of_tensors_without_grad_have_none(comm):
    assert not hvd.allreduce(torch.ones(3)).requires_grad
    assert not hvd.allgather(torch.ones(3)).requires_grad
    assert not hvd.broadcast(torch.ones(3), 0).requires_grad
    assert not hvd.synchronize(hvd.allreduce_async(torch.ones(3, requires_grad=True))).requires_grad


def test_handles_give_the_same_result_again(comm):
    for handle in (
        hvd.allreduce_async(torch.ones(5), op=hvd.Sum),
        hvd.allreduce_async_(torch.ones(5, 2).t()[1], op=hvd.Sum),
        hvd.allgather_async(torch.ones(1)),
        hvd.broadcast_async(torch.ones(2), 0),
        hvd.broadcast_async_(torch.ones(2), 0),
    ):
        first = hvd.synchronize(handle)
        assert hvd.poll(handle)
        assert hvd.synchronize(handle) is first


def test_poll_becomes_true_by_itself(comm):
    handle = hvd.allreduce_async(torch.ones(300_000), op=hvd.Sum)
    deadline = time.monotonic() + 30
    while not hvd.poll(handle):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert hvd.synchronize(handle)[-1] == comm.size


def test_poll_is_false_while_another_rank_has_not_come(comm):
    if comm.size == 1:
        return
    if comm.rank == 0:
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum)
        time.sleep(0.05)
        assert not hvd.poll(handle)
        comm.send(np.ones(1), 1)
    elif comm.rank == 1:
        comm.recv(np.empty(1), 0)
    if comm.rank:
        handle = hvd.allreduce_async(torch.ones(3), op=hvd.Sum)
    assert_equal(hvd.synchronize(handle), torch.full((3,), float(comm.size)))


def test_handles_can_be_waited_for_in_any_order(comm):
    handles = []
    for i in range(30):
        shape = (3, 40 + 1000 * (i % 3))
        x = data(comm.rank, shape, "int32", i)
        if i % 3 == 0:
            handles.append((hvd.allreduce_async(x, op=hvd.Sum), reduced("Sum", comm.size, shape, "int32", i)))
        elif i % 3 == 1:
            handles.append((hvd.allreduce_async_(x, op=hvd.Max), reduced("Max", comm.size, shape, "int32", i)))
        else:
            handles.append((hvd.broadcast_async_(x, i % comm.size), data(i % comm.size, shape, "int32", i)))
    hvd.barrier()
    for handle, expected in reversed(handles):
        assert_equal(hvd.synchronize(handle), expected)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_compression_rounds_twice_and_no_more(comm, kind):
    compression, wire = getattr(hvd.Compression, kind), {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    rows = [torch.from_numpy(np.random.default_rng(r).standard_normal(10_000)) for r in range(comm.size)]
    for dtype in (torch.float32, torch.float64):
        got = hvd.allreduce(rows[comm.rank].to(dtype), compression=compression, op=hvd.Sum)
        assert got.dtype == dtype
        unit = torch.finfo(wire).eps / 2
        size_of_terms = torch.stack(rows).abs().sum(0)  # each term is rounded once, then the sum
        error = (got.double() - torch.stack(rows).sum(0)).abs()
        assert (error <= unit * size_of_terms * 2.01 + 1e-6).all()
        assert error.max() > unit / 100  # it was compressed


def test_compression_leaves_other_types_alone(comm):
    for dtype in ("int64", "int8", "bool", "float16", "bfloat16"):
        x = data(comm.rank, (100,), dtype)
        for compression in (hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.bf16):
            assert compression.compress(x)[0].dtype == x.dtype
            assert_equal(hvd.allreduce(x, compression=compression, op=hvd.Max), reduced("Max", comm.size, (100,), dtype))


def test_compress_and_decompress_are_inverse_up_to_rounding(comm):
    x = torch.tensor([1.0, -2.5, 65504.0])
    for compression, wire in ((hvd.Compression.fp16, torch.float16), (hvd.Compression.bf16, torch.bfloat16)):
        compressed, context = compression.compress(x)
        assert compressed.dtype == wire
        torch.testing.assert_close(compression.decompress(compressed, context), x, rtol=2**-8, atol=0)


def test_what_is_no_dense_tensor_is_refused(comm):
    sparse = torch.eye(3).to_sparse()
    for call in (hvd.allreduce_async, hvd.allreduce_async_, hvd.allgather, lambda x: hvd.broadcast(x, 0)):
        for x in (sparse, [1.0, 2.0], np.ones(3)):
            with pytest.raises(roundel.InvalidArgumentError, match="dense torch"):
                call(x)
        with pytest.raises(roundel.InvalidArgumentError, match="expected float32"):
            call(torch.ones(2, dtype=torch.complex64))
    for root in (-1, comm.size):
        with pytest.raises(roundel.InvalidArgumentError, match="a rank from 0"):
            hvd.broadcast(torch.ones(3), root)
    assert_equal(hvd.allreduce(torch.ones(3), op=hvd.Sum), torch.full((3,), float(comm.size)))  # still works


def test_allgather_of_rows_of_different_shape_is_a_mismatch_and_the_job_goes_on(comm):
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    for x in (
        torch.ones(2, 3, 4) if last else torch.ones(2, 4, 3),
        torch.ones(2, dtype=torch.int32 if last else torch.float32),
    ):
        with pytest.raises(roundel.MismatchError, match="called allgather of .* where rank .* called"):
            hvd.allgather(x)
    assert_equal(hvd.allgather(torch.tensor([comm.rank])), torch.arange(comm.size))
