"""The engine: named requests in any order, from any thread, agreed between ranks."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import roundel
from roundel.world import engine

TEAMS = [("shm", 1), *((transport, size) for transport in ("shm", "tcp") for size in (2, 3, 4)), ("hosts", 3), ("hosts", 4)]
AVERAGE, SUM, MIN, MAX, PRODUCT = 1, 0, 2, 3, 4


def ranks_data(rank, n=6, dtype=np.float32):
    return (np.arange(n) % 5 + rank + 1).astype(dtype)


def one(handle):
    (result,) = handle.wait()
    return result


@pytest.mark.parametrize("op", [SUM, AVERAGE, MIN, MAX, PRODUCT])
def test_allreduce(comm, op):
    inputs = np.stack([ranks_data(r) for r in range(comm.size)])
    expected = {SUM: inputs.sum(0), AVERAGE: inputs.mean(0), MIN: inputs.min(0), MAX: inputs.max(0), PRODUCT: inputs.prod(0)}
    np.testing.assert_allclose(one(engine().allreduce([ranks_data(comm.rank)], op=op)), expected[op], rtol=1e-6)


def test_allreduce_scales_and_works_in_place(comm):
    x = ranks_data(comm.rank)
    total = sum(ranks_data(r) for r in range(comm.size))
    (y,) = engine().allreduce([x], [x], op=SUM, prescale=2.0, postscale=3.0, name="scaled").wait()
    assert y is x
    np.testing.assert_allclose(x, 6 * total)


def test_what_ranks_say_of_requests_may_be_longer_than_the_way_holds(comm):
    """Announcements go on while the first of what they announce is carried out."""
    names = [f"{i:04}" * 1000 for i in range(300)]
    xs = [np.full(3, comm.rank, np.float32) for _ in names]
    handles = [engine().allreduce_in_place(x, MAX, 1.0, 1.0, name) for x, name in zip(xs, names, strict=True)]
    for handle in handles:
        handle.wait()
    assert all((x == comm.size - 1).all() for x in xs)


def test_a_name_that_comes_again_may_ask_for_something_else(comm):
    """What ranks have agreed on before takes a short way: only where all of it is the same."""
    ranks = range(1, comm.size + 1)
    start = engine().allreduce_in_place
    for _ in range(3):
        for shape, dtype, op, scale in [
            ((4,), np.float32, SUM, 1.0),
            ((4,), np.float32, MAX, 1.0),
            ((5,), np.float32, SUM, 1.0),
            ((2, 2), np.float32, SUM, 1.0),
            ((4,), np.float64, SUM, 1.0),
            ((4,), np.float32, SUM, 0.5),
            ((), np.int64, PRODUCT, 1.0),
            ((0,), np.float32, SUM, 1.0),
        ]:
            for _ in range(2):
                x = np.full(shape, comm.rank + 1, dtype)
                assert start(x, op, scale, 1.0, "again").wait() is x
                assert (x == scale * {SUM: sum(ranks), MAX: max(ranks), PRODUCT: np.prod(ranks)}[op]).all()


def test_a_name_that_comes_again_is_refused_as_the_first_time(comm):
    start = engine().allreduce_in_place
    x = np.zeros(4, np.float32)
    for _ in range(2):
        start(x, SUM, 1.0, 1.0, "again").wait()
    first = start(x, SUM, 1.0, 1.0, "again") if comm.rank == 0 else None
    if first is not None and comm.size > 1:  # it waits for the others
        with pytest.raises(roundel.DuplicateNameError, match="'again'"):
            start(np.zeros(4, np.float32), SUM, 1.0, 1.0, "again")
    comm.barrier()
    (first or start(x, SUM, 1.0, 1.0, "again")).wait()
    with pytest.raises(roundel.InvalidArgumentError, match="process set 7"):
        start(x, SUM, 1.0, 1.0, "again", 7)
    x.flags.writeable = False
    with pytest.raises(roundel.InvalidArgumentError, match="writable"):
        start(x, SUM, 1.0, 1.0, "again")
    if comm.size > 1:
        odd = np.zeros(4 + comm.rank % 2, np.float32)
        with pytest.raises(roundel.MismatchError, match="'again'"):
            start(odd, SUM, 1.0, 1.0, "again").wait()
    y = np.full(4, comm.rank, np.float32)
    start(y, MAX, 1.0, 1.0, "again").wait()
    assert (y == comm.size - 1).all()


def test_a_group_is_one_request_of_many_dtypes_and_sizes(comm):
    shapes, dtypes = [(3,), (2, 5), (), (0,), (400_000,)], [np.float32, np.int64, np.float64, np.float32, np.float32]
    xs = [np.full(s, comm.rank + 1, d) for s, d in zip(shapes, dtypes, strict=True)]
    results = engine().allreduce(xs, op=SUM, name="group").wait()
    total = comm.size * (comm.size + 1) // 2
    for x, result in zip(xs, results, strict=True):
        assert result.shape == x.shape and result.dtype == x.dtype
        assert (result == total).all()


def test_allgather_of_different_rows(comm):
    x = np.full((comm.rank, 3), comm.rank, np.int32)
    y = np.array(float(comm.rank))
    rows, scalars = engine().allgather([x, y], name="rows").wait()
    expected = np.concatenate([np.full((r, 3), r, np.int32) for r in range(comm.size)])
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scalars, np.arange(comm.size))
    assert rows.dtype == np.int32 and rows.flags.writeable


def test_broadcast(comm):
    for root in range(comm.size):
        x = np.full(5, comm.rank, np.float16)
        assert engine().broadcast(x, root, name=f"from {root}").wait() is x
        assert (x == root).all()


def test_alltoall_evenly_and_by_splits(comm):
    x = np.arange(2 * comm.size) + 100 * comm.rank
    result, received = engine().alltoall(x, name="even").wait()
    assert received == [2] * comm.size
    np.testing.assert_array_equal(result.reshape(-1, 2)[:, 0], [100 * r + 2 * comm.rank for r in range(comm.size)])
    splits = [r + comm.rank for r in range(comm.size)]  # to rank r
    x = np.repeat(np.arange(comm.size), splits)[:, None] + 10 * comm.rank
    result, received = engine().alltoall(x, splits, name="uneven").wait()
    assert received == [comm.rank + r for r in range(comm.size)]
    np.testing.assert_array_equal(result[:, 0], np.repeat(10 * np.arange(comm.size), received) + comm.rank)


def test_reduce_scatter(comm):
    x = np.arange(2 * comm.size + 1, dtype=np.float64)[:, None] * [1, 2]
    mine = one(engine().reduce_scatter([x], op=SUM, name="rs"))
    begin = 2 * comm.rank + min(comm.rank, 1)
    np.testing.assert_array_equal(mine, comm.size * x[begin : begin + 2 + (comm.rank == 0)])


def test_order_may_differ_between_ranks_and_threads(comm):
    names = [f"tensor {i}" for i in range(60)]
    results, errors = {}, []

    def work(share, seed):
        try:
            random.Random(seed).shuffle(share)
            handles = {n: engine().allreduce([np.full(int(n.split()[1]) + 1, 2.0)], op=SUM, name=n) for n in share}
            for n in random.Random(seed + 1).sample(share, len(share)):
                results[n] = one(handles[n])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(names[i::3], 10 * comm.rank + i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, n in enumerate(names):
        np.testing.assert_array_equal(results[n], np.full(i + 1, 2.0 * comm.size))


def test_unnamed_requests_of_different_kinds_do_not_shift_each_other(comm):
    first = [lambda: engine().allreduce([np.ones(3)], op=SUM), lambda: engine().broadcast(np.zeros(2), 0)]
    if comm.rank % 2:
        first.reverse()
    for handle in [start() for start in first]:
        handle.wait()
    engine().barrier().wait()


def test_a_name_comes_again_with_another_shape(comm):
    for n in (3, 4, 3, 5, 4):
        assert (one(engine().allreduce([np.ones(n)], op=SUM, name="changing")) == comm.size).all()


def test_a_name_in_flight_is_refused_on_its_caller_only(comm):
    if comm.size == 1:
        return
    if comm.rank == 0:
        handle = engine().allreduce([np.ones(2)], op=SUM, name="twice")
        with pytest.raises(roundel.errors.DuplicateNameError, match="rank 0: allreduce 'twice'.*under way"):
            engine().allreduce([np.ones(3)], name="twice")
        engine().barrier().wait()
    else:
        engine().barrier().wait()
        handle = engine().allreduce([np.ones(2)], op=SUM, name="twice")
    assert (one(handle) == comm.size).all()


def test_requests_of_different_kinds_may_share_a_name(comm):
    starts = [
        lambda: engine().allreduce([np.ones(3)], op=SUM, name="same"),
        lambda: engine().broadcast(np.zeros(2), 0, name="same"),
    ]
    handles = [start() for start in (starts if comm.rank % 2 else reversed(starts))]
    for handle in handles:
        handle.wait()


def different(what, last):
    x, e = np.ones(4, np.float32), engine()
    return {
        "shape": lambda: e.allreduce([np.ones(3 if last else 4)], name="odd"),
        "dtype": lambda: e.allreduce([x.astype(np.float64) if last else x], name="odd"),
        "op": lambda: e.allreduce([x], op=MAX if last else SUM, name="odd"),
        "scale": lambda: e.allreduce([x], prescale=2.0 if last else 1.0, name="odd"),
        "number": lambda: e.allreduce([x, x] if last else [x], name="odd"),
        "root": lambda: e.broadcast(x, 1 if last else 0, name="odd"),
        "row": lambda: e.allgather([np.ones((2, 3 if last else 4))], name="odd"),
        "device": lambda: e.allreduce([x], name="odd", device=0 if last else -1),
        "set": lambda: e.add_process_set([0] if last else [0, 1]),
    }[what]


@pytest.mark.parametrize("what", ["shape", "dtype", "op", "scale", "number", "root", "row", "device", "set"])
def test_different_requests_are_the_same_error_everywhere_and_the_job_goes_on(comm, what):
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    with pytest.raises(roundel.MismatchError) as caught:
        different(what, last)().wait()
    others = "rank 0" + "".join(f", {r}" for r in range(1, comm.size - 2)) + (f" and {comm.size - 2}" if comm.size > 2 else "")
    text = str(caught.value)
    assert f"{others} called" in text and f"rank {comm.size - 1} called" in text
    texts = one(engine().allgather([np.frombuffer(text.encode(), np.uint8)], name="texts")).tobytes().decode()
    assert texts == text * comm.size
    assert (one(engine().allreduce([np.ones(4)], op=SUM, name="odd")) == comm.size).all()


def test_wrong_arguments_are_refused_before_anything_starts(comm):
    e, x = engine(), np.ones(4)
    for wrong in (
        lambda: e.allreduce([x], process_set=99),
        lambda: e.allreduce([np.ones(4, bool)], op=AVERAGE),
        lambda: e.allreduce([np.ones(4, int)], op=5),
        lambda: e.allreduce([x], op=6),
        lambda: e.allreduce([x], [np.ones(3)]),
        lambda: e.allreduce([x[:3]], [x[1:]]),
        lambda: e.allreduce([np.ones((4, 4)).T]),
        lambda: e.broadcast(x, comm.size),
        lambda: e.alltoall(x, [1] * (comm.size + 1)),
        lambda: e.alltoall(x, [5] + [0] * (comm.size - 1)),
        lambda: e.alltoall(np.ones(0 if comm.size == 1 else 4), [2**64 - 1] + [5] * (comm.size > 1) + [0] * (comm.size - 2)),
        lambda: e.reduce_scatter([x], op=5),
        lambda: e.reduce_scatter([np.array(1.0)]),
        lambda: e.reduce_scatter([x], op=5),
        lambda: e.add_process_set([]),
        lambda: e.add_process_set([comm.size]),
        lambda: e.remove_process_set(0),
        lambda: e.remove_process_set(77),
        lambda: e.allreduce([x], name="x" * 5000),
    ):
        with pytest.raises(roundel.InvalidArgumentError):
            wrong()
    assert (one(e.allreduce([x], op=SUM, name="after")) == comm.size).all()


def test_ranks_that_have_joined_take_part_with_nothing(comm):
    e = engine()
    for step in range(comm.rank + 2):  # rank r calls r + 2 times
        there = [r for r in range(comm.size) if r + 2 > step]
        x = np.full(3, comm.rank + 1.0)
        np.testing.assert_array_equal(one(e.allreduce([x], op=SUM)), np.full(3, sum(r + 1 for r in there)))
        np.testing.assert_array_equal(one(e.allreduce([x], op=MAX, name="most")), np.full(3, max(there) + 1))
        np.testing.assert_array_equal(one(e.allreduce([x], op=MIN, name="least")), np.full(3, min(there) + 1))
        np.testing.assert_array_equal(one(e.allreduce([x], op=PRODUCT)), np.full(3, np.prod([r + 1 for r in there])))
        rows = one(e.allgather([x[: comm.rank + 1, None]], name="rows"))
        np.testing.assert_array_equal(rows[:, 0], np.concatenate([np.full(min(3, r + 1), r + 1) for r in there]))
        last = comm.size - 1
        np.testing.assert_array_equal(e.broadcast(x.copy(), last, name="late").wait(), np.full(3, last + 1))
        scattered = one(e.reduce_scatter([np.ones(comm.size)], op=SUM, name="scattered"))
        np.testing.assert_array_equal(scattered, [len(there)])
        _, received = e.alltoall(np.ones(comm.size), name="across").wait()
        assert received == [int(r in there) for r in range(comm.size)]
        e.barrier().wait()
    assert e.join().wait() == comm.size - 1
    assert (one(e.allreduce([np.ones(2)], op=SUM)) == comm.size).all()  # unnamed requests count alike again


def test_a_root_that_has_joined_has_nothing_to_broadcast(comm):
    if comm.size == 1:
        return
    if comm.rank != 0:
        with pytest.raises(roundel.MismatchError, match="root, rank 0, has joined"):
            engine().broadcast(np.ones(2), 0).wait()
    engine().join().wait()
    x = np.full(2, comm.rank)  # the refused broadcast counts everywhere as one
    assert (engine().broadcast(x, 0).wait() == 0).all()


def test_what_fails_or_changes_sets_while_ranks_have_joined_shifts_no_names(comm):
    if comm.size == 1:
        return
    e, number = engine(), None
    if comm.rank != 0:
        with pytest.raises(roundel.MismatchError):
            e.broadcast(np.ones(2), 0).wait()
        number = e.add_process_set([comm.size - 1]).wait()
        e.remove_process_set(number).wait()
    e.join().wait()
    assert (e.broadcast(np.full(2, comm.rank), 1).wait() == 1).all()
    again = e.add_process_set([comm.size - 1]).wait()
    assert again != number
    e.remove_process_set(again).wait()
    assert list(e.process_sets) == [0]


@pytest.mark.parametrize("op", [MIN, MAX, PRODUCT])
@pytest.mark.parametrize("prescale", [-1.0, 2.0])
def test_a_rank_that_has_joined_changes_no_scaled_extreme(comm, op, prescale):
    if comm.size > 1 and comm.rank == 0:
        engine().join().wait()
        return
    there = range(min(1, comm.size - 1), comm.size)
    inputs = np.stack([prescale * ranks_data(r) for r in there])
    expected = {MIN: inputs.min(0), MAX: inputs.max(0), PRODUCT: inputs.prod(0)}[op]
    try:
        result = one(engine().allreduce([ranks_data(comm.rank)], op=op, prescale=prescale, name="scaled"))
        np.testing.assert_array_equal(result, expected)
    except roundel.MismatchError as error:
        assert "rank 0" in str(error) and "has joined" in str(error), error
    engine().join().wait()


def test_process_sets(comm):
    e = engine()
    even = list(range(0, comm.size, 2))
    number = e.add_process_set(even).wait()
    assert e.process_sets[number] == even
    assert e.add_process_set(list(reversed(even))).wait() == number
    alone = e.add_process_set([comm.size - 1]).wait()
    if comm.rank in even:
        assert (one(e.allreduce([np.ones(3)], op=SUM, name="x", process_set=number)) == len(even)).all()
        x = np.full(2, comm.rank)
        assert (e.broadcast(x, even[-1], name="b", process_set=number).wait() == even[-1]).all()
        rows = one(e.allgather([np.array([comm.rank])], name="g", process_set=number))
        np.testing.assert_array_equal(rows, even)
    else:
        with pytest.raises(roundel.InvalidArgumentError, match=f"not in process set {number} of rank 0"):
            e.allreduce([np.ones(3)], process_set=number)
    if comm.rank == comm.size - 1:
        assert (one(e.allreduce([np.ones(3)], op=SUM, name="x", process_set=alone)) == 1).all()
    assert (one(e.allreduce([np.ones(3)], op=SUM, name="x")) == comm.size).all()
    orphan = e.allreduce([np.ones(3)], name="waits", process_set=number) if comm.rank == 0 and len(even) > 1 else None
    for each in {number, alone} - {0}:  # a set of all ranks is set 0
        e.remove_process_set(each).wait()
    if orphan is not None:
        with pytest.raises(roundel.RoundelError, match=f"process set {number} was removed"):
            orphan.wait()
    assert list(e.process_sets) == [0]


def test_handles_may_be_dropped_and_asked_twice(comm):
    e = engine()
    for i in range(20):
        e.allreduce([np.ones(1000)], name=f"dropped {i}")
    handle = e.allreduce([np.ones(2)], op=SUM, name="kept")
    assert handle.wait()[0] is handle.wait()[0]
    assert handle.done()
    e.barrier().wait()


def test_large_and_many(comm):
    e = engine()
    big = [np.full(300_000, comm.rank + 1.0, np.float32) for _ in range(3)]
    small = [np.full(i % 7, comm.rank + 1.0, np.float32) for i in range(300)]
    handles = [e.allreduce([x], [x], op=SUM, name=f"many {i}") for i, x in enumerate(small + big)]
    for handle in handles:
        assert (one(handle) == comm.size * (comm.size + 1) / 2).all()


def test_a_handle_is_one_for_all_threads_and_no_matter_what_becomes_of_its_list(comm):
    e = engine()
    for i in range(30):
        xs = [np.full((comm.rank + 1, 2), comm.rank) for _ in range(20)]
        handle = e.allgather(xs, name=f"rows {i}")
        xs.clear()
        results = []
        threads = [threading.Thread(target=lambda: results.append(handle.wait())) for _ in range(3)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = np.concatenate([np.full((r + 1, 2), r) for r in range(comm.size)])
        assert len(results) == 3
        for rows in results:
            assert len(rows) == 20
            for got in rows:
                np.testing.assert_array_equal(got, expected)


def test_nothing_is_nothing(comm):
    e = engine()
    assert e.allreduce([], name="no tensors").wait() == []
    assert e.allgather([], name="no tensors").wait() == []
    assert e.reduce_scatter([], name="no tensors").wait() == []
    assert one(e.allgather([np.ones((0, 3))], name="no rows")).shape == (0, 3)
    assert one(e.reduce_scatter([np.ones((0, 3))], name="no rows")).shape == (0, 3)
    result, received = e.alltoall(np.ones((0, 3)), name="no rows at all").wait()
    assert result.shape == (0, 3) and received == [0] * comm.size
    e.broadcast(np.ones(0), 0, name="nothing").wait()
