"""roundel's functions on arrays: every operation in every form, by name, in any order, in parts of the job, of any library."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
import roundel
from reference import DTYPES, assert_equal_bits, assert_same_on_all_ranks, over_ranks, ranks_data

TEAMS = [("shm", 1), *((transport, size) for transport in ("shm", "tcp") for size in (2, 3, 4))]
SHAPES = [(), (1,), (7,), (5, 3), (0, 4), (20_001,)]


def data(rank: int, shape: tuple[int, ...], dtype: str = "float32", salt: int = 0) -> np.ndarray:
    return ranks_data(rank, int(np.prod(shape)), dtype, salt).reshape(shape)


def reduced(op: str, size: int, shape: tuple[int, ...], dtype: str = "float32", salt: int = 0) -> np.ndarray:
    return over_ranks(op, size, int(np.prod(shape)), dtype, salt).reshape(shape)


def of_all(size: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return np.concatenate([np.atleast_1d(data(r, shape, dtype)) for r in range(size)])


def rows_of(n: int, size: int) -> list[int]:
    return [n // size + (r < n % size) for r in range(size)]


def part(array: np.ndarray, rank: int, size: int) -> np.ndarray:
    rows = rows_of(len(array), size)
    return array[sum(rows[:rank]) : sum(rows[: rank + 1])]


# -- the operations, in all forms


@pytest.mark.parametrize("op", ["Sum", "Average", "Min", "Max", "Product"])
def test_allreduce(comm, op):
    for shape, dtype in zip(SHAPES * 2, DTYPES[:8], strict=False):
        x, expected = data(comm.rank, shape, dtype), reduced(op, comm.size, shape, dtype)
        if op == "Average" and dtype.startswith("float"):  # one rounding, of sum * (1 / size)
            expected = comm.allreduce(x, roundel.Average)
            np.testing.assert_allclose(expected, reduced(op, comm.size, shape, dtype), rtol=1e-3)
        assert_equal_bits(roundel.allreduce(x, op=roundel.ReduceOp[op]), expected)
        assert_equal_bits(x, data(comm.rank, shape, dtype))
        handle = roundel.allreduce_async(x, roundel.ReduceOp[op])
        assert_equal_bits(roundel.synchronize(handle), expected)
        assert roundel.poll(handle) and handle.wait() is roundel.synchronize(handle)
        y = x.copy()
        assert roundel.allreduce_(y, roundel.ReduceOp[op]) is y
        assert_equal_bits(y, expected)
        z = x.copy()
        assert roundel.synchronize(roundel.allreduce_async_(z, roundel.ReduceOp[op])) is z
        assert_equal_bits(z, expected)


def test_averages_are_the_default_and_factors_multiply(comm):
    x = data(comm.rank, (7,), "float64")
    np.testing.assert_allclose(roundel.allreduce(x), reduced("Average", comm.size, (7,), "float64"), rtol=1e-15)
    scaled = roundel.allreduce(x, roundel.Sum, "scaled", 2.0, 0.25)
    assert_equal_bits(scaled, reduced("Sum", comm.size, (7,), "float64") / 2)
    assert_equal_bits(roundel.allreduce(x, roundel.Sum, prescale_factor=2.0, postscale_factor=0.25), scaled)


def test_adasum_of_equal_gradients_is_their_average_and_of_orthogonal_ones_their_sum(comm):
    if comm.size == 3:
        return  # a tree of pairs is exact for powers of two
    x = np.arange(1.0, 9.0)
    np.testing.assert_allclose(roundel.allreduce(x, roundel.Adasum), x, rtol=1e-12)
    mine = np.zeros(4)
    mine[comm.rank] = comm.rank + 1.0
    expected = np.where(np.arange(4) < comm.size, np.arange(1.0, 5.0), 0)
    np.testing.assert_allclose(roundel.allreduce(mine, roundel.Adasum), expected, rtol=1e-12)


def test_grouped_allreduce(comm):
    inputs = [data(comm.rank, shape, dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=False)]
    expected = [reduced("Sum", comm.size, x.shape, str(x.dtype)) for x in inputs]
    for results in (
        roundel.grouped_allreduce(inputs, roundel.Sum),
        roundel.synchronize(roundel.grouped_allreduce_async(iter(inputs), roundel.Sum, name="group")),
    ):
        for got, right in zip(results, expected, strict=True):
            assert_equal_bits(got, right)
    copies = [x.copy() for x in inputs]
    assert all(a is b for a, b in zip(roundel.grouped_allreduce_(copies, roundel.Sum), copies, strict=True))
    roundel.synchronize(roundel.grouped_allreduce_async_(copies, roundel.Min))  # of equal arrays: changes nothing
    for got, right in zip(copies, expected, strict=True):
        assert_equal_bits(got, right)


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16"])
def test_reducescatter(comm, dtype):
    for shape in [(7,), (2, 3), (0, 4), (20_001,)]:
        x = data(comm.rank, shape, dtype)
        expected = part(reduced("Sum", comm.size, shape, dtype), comm.rank, comm.size)
        assert_equal_bits(roundel.reducescatter(x, roundel.Sum), expected)
        assert_equal_bits(roundel.reduce_scatter(x, op=roundel.Sum, name="other name"), expected)
        assert_equal_bits(roundel.synchronize(roundel.reducescatter_async(x, roundel.Sum)), expected)
        half = roundel.reducescatter(x.astype("float64"), roundel.Sum, prescale_factor=0.5)
        assert_equal_bits(half, expected.astype("float64") / 2)
        for results in (
            roundel.grouped_reducescatter([x, x[:1]], roundel.Sum),
            roundel.synchronize(roundel.grouped_reducescatter_async([x, x[:1]], roundel.Sum)),
        ):
            assert_equal_bits(results[0], expected)
            assert_equal_bits(results[1], part(reduced("Sum", comm.size, shape, dtype)[:1], comm.rank, comm.size))
    with pytest.raises(roundel.InvalidArgumentError, match="at least one dimension"):
        roundel.reducescatter(3.0)


@pytest.mark.parametrize("dtype", ["float32", "bool", "uint8"])
def test_allgather_of_different_rows(comm, dtype):
    def mine(rank: int) -> np.ndarray:
        return data(rank, (rank * 3 + 1 if rank != 1 else 0, 2), dtype)

    expected = np.concatenate([mine(r) for r in range(comm.size)])
    assert_equal_bits(roundel.allgather(mine(comm.rank)), expected)
    assert_equal_bits(roundel.synchronize(roundel.allgather_async(mine(comm.rank), name="rows")), expected)
    scalars = np.concatenate([np.atleast_1d(data(r, (), dtype)) for r in range(comm.size)])
    for results in (
        roundel.grouped_allgather([mine(comm.rank), data(comm.rank, (), dtype)]),
        roundel.synchronize(roundel.grouped_allgather_async([mine(comm.rank), data(comm.rank, (), dtype)])),
    ):
        assert_equal_bits(results[0], expected)
        assert_equal_bits(results[1], scalars)


def test_broadcast(comm):
    for root in range(comm.size):
        for shape in SHAPES:
            x, expected = data(comm.rank, shape), data(root, shape)
            got = roundel.broadcast(x, root)
            assert got is not x
            assert_equal_bits(got, expected)
            assert_equal_bits(roundel.synchronize(roundel.broadcast_async(x, root)), expected)
            assert_equal_bits(x, data(comm.rank, shape))
            y = x.copy()
            assert roundel.broadcast_(y, root, name="in place") is y
            assert_equal_bits(y, expected)
            z = x.copy()
            assert roundel.synchronize(roundel.broadcast_async_(z, root)) is z
            assert_equal_bits(z, expected)


def test_alltoall(comm):
    x = data(comm.rank, (comm.size * 2, 3))
    pieces = [data(r, (comm.size * 2, 3))[comm.rank * 2 : comm.rank * 2 + 2] for r in range(comm.size)]
    assert_equal_bits(roundel.alltoall(x), np.concatenate(pieces))
    sends = [[(r + to) % 3 for to in range(comm.size)] for r in range(comm.size)]
    everyones = [data(r, (sum(sends[r]),)) for r in range(comm.size)]
    begin = [sum(sends[r][: comm.rank]) for r in range(comm.size)]
    expected = np.concatenate([everyones[r][begin[r] : begin[r] + sends[r][comm.rank]] for r in range(comm.size)])
    for splits in (sends[comm.rank], np.array(sends[comm.rank], np.int32)):
        for got, received in (
            roundel.alltoall(everyones[comm.rank], splits),
            roundel.synchronize(roundel.alltoall_async(everyones[comm.rank], splits, name="uneven")),
        ):
            assert_equal_bits(got, expected)
            assert received.tolist() == [sends[r][comm.rank] for r in range(comm.size)]
    for wrong in ([1] * (comm.size + 1), [-1] * comm.size, [0.5] * comm.size, 3):
        with pytest.raises(roundel.InvalidArgumentError, match="splits that add up to"):
            roundel.alltoall(x, wrong)
    roundel.barrier()


class Unpicklable:
    def __reduce__(self):
        raise TypeError("this does not pickle")


def test_an_object_that_does_not_pickle_is_everyones_error_and_the_job_goes_on(comm):
    mine = Unpicklable() if comm.rank == 0 else 1
    for call in (lambda: roundel.broadcast_object(mine, 0), lambda: roundel.allgather_object(mine)):
        error, words = (TypeError, "does not pickle") if comm.rank == 0 else (roundel.RoundelError, "rank 0 could not pickle")
        with pytest.raises(error, match=words):
            call()
    assert roundel.allgather_object(comm.rank) == list(range(comm.size))


def test_objects(comm):
    mine = {"rank": comm.rank, "text": "x" * comm.rank * 1000, "nothing": None}
    for root in range(comm.size):
        got = roundel.broadcast_object(mine, root)
        assert got == {"rank": root, "text": "x" * root * 1000, "nothing": None}
        assert (got is mine) == (comm.rank == root)
        assert roundel.broadcast_object(mine if comm.rank == root else None, root_rank=root, name="named")["rank"] == root
    for name in (None, "named"):
        assert [o["rank"] for o in roundel.allgather_object(mine, name)] == list(range(comm.size))


# -- any order, any thread


def test_named_operations_meet_in_any_order(comm):
    names = [f"tensor {i}" for i in range(40)]
    order = np.random.default_rng(comm.rank).permutation(len(names))
    handles = {i: roundel.allreduce_async(data(comm.rank, (i + 1,), salt=i), roundel.Sum, names[i]) for i in order}
    for i in reversed(range(len(names))):
        assert_equal_bits(handles[i].wait(), reduced("Sum", comm.size, (i + 1,), salt=i))


def test_threads_call_what_they_like(comm):
    failures = []

    def work(thread: int) -> None:
        try:
            for i in range(10):
                x = data(comm.rank, (50,), salt=thread)
                name = f"thread {thread} step {i}"
                assert_equal_bits(roundel.allreduce(x, roundel.Sum, name), reduced("Sum", comm.size, (50,), salt=thread))
                assert_equal_bits(roundel.broadcast(x, i % comm.size, name), data(i % comm.size, (50,), salt=thread))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads if comm.rank % 2 else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def test_a_name_in_flight_is_not_taken_twice(comm):
    if comm.size == 1:
        return
    if comm.rank == 0:
        first = roundel.allreduce_async(np.ones(3), roundel.Sum, "taken")
        with pytest.raises(roundel.DuplicateNameError, match="taken"):
            roundel.allreduce_async(np.ones(3), roundel.Sum, "taken")
        roundel.barrier()
        assert first.wait().tolist() == [comm.size] * 3
    else:
        roundel.barrier()
        assert roundel.allreduce(np.ones(3), roundel.Sum, "taken").tolist() == [comm.size] * 3


def test_a_mismatch_is_everyones_and_the_job_goes_on(comm):
    if comm.size == 1:
        return
    for wrong in (np.ones(4), np.ones(3, np.float64), np.ones((3, 1), np.float32)):
        with pytest.raises(roundel.MismatchError, match=f"rank {comm.size - 1}"):
            roundel.allreduce(wrong if comm.rank == comm.size - 1 else np.ones(3, np.float32), roundel.Sum, "odd one out")
    with pytest.raises(roundel.MismatchError):
        roundel.broadcast(np.ones(3), root_rank=comm.rank % 2, name="two roots")
    assert roundel.allreduce(np.ones(3), roundel.Sum, "odd one out").tolist() == [comm.size] * 3


def test_ranks_without_data_join(comm):
    """Rank r has r + 1 batches."""
    for batch in range(comm.rank + 1):
        total = roundel.allreduce(np.full(5, 1.0), roundel.Sum, name=f"batch {batch}")
        assert total.tolist() == [comm.size - batch] * 5
        average = roundel.allreduce(np.full(5, float(comm.size)), name=f"average {batch}")
        assert average.tolist() == [comm.size - batch] * 5
        assert roundel.allgather(np.ones(2), name=f"rows {batch}").shape == (2 * (comm.size - batch),)
    last = roundel.join()
    assert_same_on_all_ranks(comm, np.array([last]))
    assert 0 <= last < comm.size
    assert roundel.allreduce(1.0, roundel.Sum) == comm.size  # all are back


# -- parts of the job


def test_process_sets(comm):
    if comm.size < 3:
        return
    ends = roundel.add_process_set([0, comm.size - 1])
    assert ends.size() == 2 and ends.included() == (comm.rank in (0, comm.size - 1))
    if ends.included():
        me = ends.rank()
        x = np.array([float(comm.rank), 1.0])
        total = [float(comm.size - 1), 2.0]
        assert roundel.allreduce(x, roundel.Sum, process_set=ends).tolist() == total
        assert roundel.grouped_allreduce([x], roundel.Sum, process_set=ends)[0].tolist() == total
        assert roundel.allreduce(x, process_set=ends).tolist() == [t / 2 for t in total]
        assert roundel.allgather(np.array([me]), process_set=ends).tolist() == [0, 1]
        assert roundel.broadcast(x, comm.size - 1, process_set=ends)[0] == comm.size - 1
        assert roundel.reducescatter(x, roundel.Sum, process_set=ends).tolist() == [total[me]]
        assert roundel.alltoall(x, process_set=ends).tolist() == [0.0 if me == 0 else 1.0, comm.size - 1.0 if me == 0 else 1.0]
        assert roundel.broadcast_object(comm.rank, 0, process_set=ends) == 0
        assert roundel.allgather_object(comm.rank, process_set=ends) == [0, comm.size - 1]
        roundel.barrier(ends)
        with pytest.raises(roundel.InvalidArgumentError, match=rf"one of the ranks \[0, {comm.size - 1}\], got 1"):
            roundel.broadcast(x, 1, process_set=ends)
    else:
        with pytest.raises(roundel.RoundelError, match="not in process set"):
            roundel.allreduce(np.ones(2), process_set=ends)
    assert roundel.allreduce(1.0, roundel.Sum) == comm.size
    assert roundel.remove_process_set(ends)
    with pytest.raises(roundel.InvalidArgumentError, match="not known to the job"):
        roundel.allreduce(np.ones(2), process_set=ends)
    with pytest.raises(roundel.InvalidArgumentError, match="expected a ProcessSet, got list"):
        roundel.barrier([0, 1])


# -- arrays as they come


def test_arrays_that_are_not_contiguous_are_copied_and_changed_in_place(comm):
    base = data(comm.rank, (6, 4))
    expected = reduced("Sum", comm.size, (6, 4))
    for view in (np.s_[::2], np.s_[:, 1:3]):
        x = base.copy()
        assert_equal_bits(roundel.allreduce(x[view], roundel.Sum), expected[view])
        y = x[view]
        assert roundel.allreduce_(y, roundel.Sum) is y
        right = base.copy()
        right[view] = expected[view]
        assert_equal_bits(x, right)
        roundel.broadcast_(x[view], comm.size - 1)
    assert_equal_bits(roundel.allreduce(base.T, roundel.Sum), np.ascontiguousarray(expected.T))


def test_lists_and_numbers_are_arrays_too(comm):
    assert roundel.allreduce(comm.rank + 0.5, roundel.Sum) == sum(r + 0.5 for r in range(comm.size))
    assert roundel.allreduce([[1, 2], [3, 4]], roundel.Sum).tolist() == [
        [comm.size * n for n in row] for row in ([1, 2], [3, 4])
    ]
    assert roundel.broadcast([comm.rank], comm.size - 1).tolist() == [comm.size - 1]
    assert roundel.allgather(comm.rank).tolist() == list(range(comm.size))


def test_what_cannot_be_taken_is_refused_before_others_wait(comm):
    frozen = np.ones(3)
    frozen.flags.writeable = False
    for call, words in [
        (lambda: roundel.allreduce_([1.0]), "an array to change in place, got list"),
        (lambda: roundel.allreduce_(frozen), "a writable array"),
        (lambda: roundel.broadcast_(frozen, 0), "a writable array"),
        (lambda: roundel.allreduce(np.ones(3, complex)), "expected float32"),
        (lambda: roundel.allreduce(np.ones(3), op=9), "expected op to be one of Sum"),
        (lambda: roundel.grouped_allreduce(np.ones(3)), "expected a list of arrays, got ndarray"),
        (lambda: roundel.grouped_allreduce([]), "at least one array"),
        (lambda: roundel.broadcast(np.ones(3), comm.size), f"a rank from 0 to {comm.size - 1}, got {comm.size}"),
        (lambda: roundel.synchronize(3), "expected a handle"),
    ]:
        with pytest.raises(roundel.InvalidArgumentError, match=words):
            call()
    assert roundel.allreduce(1.0, roundel.Sum) == comm.size


def test_torch_tensors_stay_torch_tensors(comm):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = torch.arange(6, dtype=dtype).reshape(2, 3) + comm.rank
        expected = sum(torch.arange(6, dtype=dtype).reshape(2, 3) + r for r in range(comm.size))
        for view in (x, x.t()):
            got = roundel.allreduce(view, roundel.Sum)
            assert isinstance(got, torch.Tensor) and torch.equal(got, expected if view is x else expected.t())
        y = x.clone()
        assert roundel.allreduce_(y, roundel.Sum) is y and torch.equal(y, expected)
        assert torch.equal(roundel.broadcast(x, 0), torch.arange(6, dtype=dtype).reshape(2, 3))
        assert roundel.allgather(x).shape == (2 * comm.size, 3)
        assert roundel.alltoall(x.new_ones(comm.size)).tolist() == [1] * comm.size


class Exchanged:
    """What a library looks like that we know nothing about."""

    def __init__(self, values, device: int = 1) -> None:
        self.values, self.device = values, device

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device, 0


class Standard(Exchanged):
    """The same with the array API standard's way to its library."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda source: Standard(np.from_dlpack(source)))


def test_arrays_of_other_libraries_come_through_dlpack(comm):
    x, expected = data(comm.rank, (5, 3)), reduced("Sum", comm.size, (5, 3))
    assert_equal_bits(roundel.allreduce(Exchanged(x), roundel.Sum), expected)
    assert_equal_bits(roundel.broadcast(Exchanged(x), 0), data(0, (5, 3)))
    assert_equal_bits(x, data(comm.rank, (5, 3)))
    got = roundel.allreduce(Standard(x), roundel.Sum)
    assert isinstance(got, Standard)
    assert_equal_bits(got.values, expected)
    assert_equal_bits(roundel.allgather(Standard(x)).values, of_all(comm.size, (5, 3)))
    mine = Exchanged(x.copy())
    assert roundel.allreduce_(mine, roundel.Sum) is mine
    assert_equal_bits(mine.values, expected)
    with pytest.raises(roundel.InvalidArgumentError, match="got Exchanged on a device of DLPack's type 10"):
        roundel.allreduce(Exchanged(x, device=10))


class OnDevice:
    """As much of cupy.ndarray as is used, with numpy's memory for the device's."""

    def __init__(self, values, index: int) -> None:
        self.values, self.device = values, Device(index)

    def __setitem__(self, key, other) -> None:
        assert isinstance(other, OnDevice)
        self.values[key] = other.values


class Device:
    current = 0

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_):
        Device.current = self.before


def test_cupys_arrays_go_through_the_hosts_memory(comm):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = OnDevice
    cupy.asnumpy = lambda array, order: np.array(array.values, order=order)
    cupy.asarray = lambda array: OnDevice(np.array(array), Device.current)
    sys.modules["cupy"] = cupy
    try:
        x = OnDevice(data(comm.rank, (6, 4))[::2], comm.rank)  # each rank has its own device
        expected = reduced("Sum", comm.size, (6, 4))[::2]
        got = roundel.allreduce(x, roundel.Sum)
        assert isinstance(got, OnDevice) and got.device.id == comm.rank
        assert_equal_bits(got.values, expected)
        assert_equal_bits(roundel.allgather(x).values[:3], data(0, (6, 4))[::2])
        assert roundel.broadcast_(x, 0) is x
        assert_equal_bits(x.values, data(0, (6, 4))[::2])
        with pytest.raises(roundel.InvalidArgumentError, match=rf"of one device, got \[-1, {comm.rank}\]"):
            roundel.grouped_allreduce([x, np.ones(3)])
    finally:
        del sys.modules["cupy"]
