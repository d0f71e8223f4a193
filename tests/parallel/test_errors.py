"""What goes wrong between living ranks: all get the same kind of error, which names ranks and operations; nothing hangs."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import roundel
from reference import ranks_data
from roundel import MismatchError, PeerLostError, ReduceOp

TEAMS = [("shm", 3), ("tcp", 3), ("ring", 2), ("hosts", 4)]

pytestmark = pytest.mark.ends_communicator

# What rank 1 calls where the others call allreduce(float32[n], Sum, name="a").
DIFFERENT = {
    "count": lambda c, n: c.allreduce(np.ones(n + 1, np.float32), name="a"),
    "dtype": lambda c, n: c.allreduce(np.ones(n, np.int32), name="a"),
    "op": lambda c, n: c.allreduce(np.ones(n, np.float32), ReduceOp.Max, name="a"),
    "name": lambda c, n: c.allreduce(np.ones(n, np.float32), name="b"),
    "shape": lambda c, n: c.allreduce(np.ones((n // 2, 2), np.float32), name="a"),
    "scale": lambda c, n: c.allreduce(np.ones(n, np.float32), name="a", prescale=2.0),
    "collective": lambda c, n: c.allgather(np.ones(n // c.size, np.float32), name="a"),
}


@pytest.mark.parametrize("count", [6, 600_000])
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_mismatch_is_an_error_on_every_rank(comm, what, count):
    started = time.monotonic()
    with pytest.raises(MismatchError, match=r"rank \d called .* where rank \d called"):
        if comm.rank == 1:
            DIFFERENT[what](comm, count)
        else:
            comm.allreduce(np.ones(count, np.float32), name="a")
        comm.barrier()  # a rank whose own part happened to be complete learns it from the next operation
    assert time.monotonic() - started < 3
    with pytest.raises(MismatchError):  # the communicator has ended, and says why
        comm.allreduce(np.ones(3))


def test_different_roots_are_a_mismatch(comm):
    with pytest.raises(MismatchError, match=r"root [01] .*root [01] "):
        comm.broadcast(ranks_data(comm.rank, 100_000, "float32"), 0 if comm.rank != 1 else 1)
        comm.barrier()


def test_a_late_rank_is_named_when_the_deadline_passes(comm):
    if comm.rank == comm.size - 1:
        with pytest.raises(roundel.TimeoutError):  # hears of it from the others
            for _ in range(100):
                time.sleep(0.1)
                comm.recv_async(np.empty(1), 0)
        return
    with pytest.raises(roundel.TimeoutError, match="timed out after 0.5 s waiting for rank"):
        comm.allreduce(np.ones(10), name="late", timeout=0.5)


def test_the_timeout_is_a_builtin_timeout_too(comm):
    if comm.rank == 0:
        with pytest.raises(TimeoutError):
            comm.barrier(timeout=0.2)
    else:
        time.sleep(0.6)


def test_asynchronous_operations_fail_when_they_are_waited_for(comm):
    handle = comm.allreduce_async(np.ones(5 if comm.rank == 1 else 6))
    with pytest.raises(MismatchError):
        handle.wait()
    with pytest.raises(MismatchError):  # later ones fail at once
        comm.allreduce_async(np.ones(2))


def test_a_rank_that_leaves_is_named_by_those_who_need_it(comm):
    comm.barrier()
    if comm.rank == comm.size - 1:
        comm.shutdown(0)
        with pytest.raises(roundel.RoundelError, match="shut down"):
            comm.barrier()
        return
    with pytest.raises(PeerLostError) as caught:
        comm.allreduce(np.ones(4), name="after the leave")
    assert caught.value.ranks == (comm.size - 1,)
    assert "after the leave" in str(caught.value)


def test_the_last_operation_survives_a_rank_that_leaves_right_after_it(comm):
    for count in (3, 100_000):
        x = np.full(count, 1.0, dtype=np.float32)
        assert (comm.allreduce(x) == comm.size).all()
    comm.shutdown(0)


def test_a_forked_child_is_no_rank_and_does_not_harm_its_parent(comm):
    import os

    comm.allreduce(np.ones(3))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            comm.allreduce(np.ones(3))
        except roundel.RoundelError as error:
            code = 0 if "forked" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert comm.allreduce(np.ones(3))[0] == comm.size


def test_a_barrier_names_all_who_are_missing(comm):
    if comm.rank > 0:
        with pytest.raises(roundel.TimeoutError):
            time.sleep(1)
            comm.recv(np.empty(1), 0)
        return
    missing = {2: "rank 1", 3: "rank 1 and 2", 4: "rank 1, 2 and 3"}[comm.size]
    with pytest.raises(roundel.TimeoutError, match=f"barrier .*timed out after 0.5 s waiting for {missing}(;|$)"):
        comm.barrier(timeout=0.5)


@pytest.mark.parametrize("what", ["gather", "scatter"])
def test_two_roots_that_only_wait_find_out(comm, what):
    started = time.monotonic()
    root = 0 if comm.rank != 1 else 1
    with pytest.raises(MismatchError, match=r"root [01] .*root [01] "):
        if what == "gather":
            comm.gather(np.ones(4), root)
            comm.barrier()  # whoever has sent its part learns it here
        else:
            comm.scatter(np.ones(comm.size) if comm.rank == 1 - root else None, 1 - root, out=np.ones(1))
            comm.barrier()
    assert time.monotonic() - started < 5


def test_a_forked_child_may_shut_down_what_is_not_its_own(comm):
    import os
    import signal

    comm.allreduce_async(np.ones(3)).wait()
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        comm.shutdown(0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert comm.allreduce(np.ones(3))[0] == comm.size


def test_an_array_may_ask_for_its_result_when_it_goes(comm):
    handles, seen = [], []

    class Array(np.ndarray):
        def __del__(self):
            if handles:
                seen.append(handles.pop().wait()[0])

    x = np.ones(3).view(Array)
    handle = comm.allreduce_async(x)
    handles.append(handle)
    del x
    result = handle.wait()
    assert result[0] == comm.size and seen == [comm.size]
    del handle
    assert sys.getrefcount(result) == 2  # `result` and the argument: let go of once, not twice
