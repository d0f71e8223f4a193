"""Horovod's operations on arrays of numpy and everything that speaks DLPack, through the engine of all ranks.

They may be called from any thread, and ranks may differ in the order: an operation is known by its name, or, without one, by
how many of its kind have been called in the process set. Each has a form that starts it (`*_async`: a handle for synchronize()
and poll()), a form that changes its arrays in place (`*_`) where that makes sense, and a form for several arrays (`grouped_*`),
which is done for all or for none. roundel/rooted.py has reduce, gather and scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from roundel import world
from roundel.arrays import Staged, stage, stage_all
from roundel.errors import InvalidArgumentError
from roundel.handles import Handle, waits_for
from roundel.ops import Average, ReduceOp, choose_op
from roundel.process_sets import ProcessSet, global_process_set, number_of

__all__ = [
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "join",
    "reduce_scatter",
    "reducescatter",
    "reducescatter_async",
]


def _given(staged: list[Staged]) -> Callable[[list[Any]], list[Any]]:
    return lambda results: [s.give(result) for s, result in zip(staged, results, strict=True)]


def _written(staged: list[Staged]) -> Callable[[list[Any]], list[Any]]:
    return lambda _: [s.write_back() for s in staged]


def _first(finish: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], Any]:
    return lambda results: finish(results)[0]


# -- all-reduce


def _reduce(staged: list[Staged], in_place: bool, op, name, prescale, postscale, process_set) -> Any:
    what = staged[0].what
    sources = [s.buffer for s in staged]
    private = in_place or all(s.is_copy for s in staged)  # nobody reads the buffers as they are after this
    return world.engine().allreduce(
        sources,
        sources if private else None,
        choose_op(None, op, what),
        prescale=prescale,
        postscale=postscale,
        name=name or "",
        process_set=number_of(process_set, what),
        device=staged[0].device,
    )


def allreduce_async(
    array: Any,
    op: ReduceOp = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start allreduce(). The array must not change until the operation is done."""
    staged = [stage(array, "allreduce")]
    native = _reduce(staged, False, op, name, prescale_factor, postscale_factor, process_set)
    return Handle(native, _first(_given(staged)))


def allreduce_async_(
    array: Any,
    op: ReduceOp = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start allreduce_(). The array belongs to the operation until it is done."""
    staged = [stage(array, "allreduce_", in_place=True)]
    native = _reduce(staged, True, op, name, prescale_factor, postscale_factor, process_set)
    return Handle(native, _first(_written(staged)))


def grouped_allreduce_async(
    arrays: Iterable[Any],
    op: ReduceOp = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start grouped_allreduce()."""
    staged = stage_all(arrays, "grouped_allreduce")
    return Handle(_reduce(staged, False, op, name, prescale_factor, postscale_factor, process_set), _given(staged))


def grouped_allreduce_async_(
    arrays: Iterable[Any],
    op: ReduceOp = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start grouped_allreduce_()."""
    staged = stage_all(arrays, "grouped_allreduce_", in_place=True)
    return Handle(_reduce(staged, True, op, name, prescale_factor, postscale_factor, process_set), _written(staged))


allreduce = waits_for(
    allreduce_async,
    "allreduce",
    """Reduce `array` over the ranks of the set; every rank gets the same new array.

    array: any shape, the same on every rank; float32, float64, float16, bfloat16, int8..int64, uint8 or bool. A list or a
    number counts as a numpy array.
    op: Average, Sum, Min, Max, Product or Adasum. 16-bit sums accumulate in float32 and round once; integer averages truncate.
    name: agreed between ranks; operations without one are counted.
    prescale_factor, postscale_factor: multiply before and after.
    Raises InvalidArgumentError at once, DuplicateNameError (the name is in flight), MismatchError (ranks differ in shape,
    dtype, op or factors; the job goes on), PeerLostError, TimeoutError.
    """,
)
allreduce_ = waits_for(allreduce_async_, "allreduce_", "Reduce `array` over the ranks in place and return it; see allreduce.")
grouped_allreduce = waits_for(
    grouped_allreduce_async,
    "grouped_allreduce",
    "allreduce of a list of arrays: all or none, and together. Returns a list of new arrays in the same order.",
)
grouped_allreduce_ = waits_for(
    grouped_allreduce_async_, "grouped_allreduce_", "Reduce a list of arrays in place and return them; see grouped_allreduce."
)


# -- reduce-scatter


def _scatter(staged: list[Staged], op, name, process_set, prescale, postscale) -> Any:
    what = staged[0].what
    if any(not len(s.buffer.shape) for s in staged):
        raise InvalidArgumentError(f"{what}: expected arrays of at least one dimension, got a scalar")
    return world.engine().reduce_scatter(
        [s.buffer for s in staged],
        choose_op(None, op, what),
        prescale=prescale,
        postscale=postscale,
        name=name or "",
        process_set=number_of(process_set, what),
        device=staged[0].device,
    )


def reducescatter_async(
    array: Any,
    op: ReduceOp = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start reducescatter()."""
    staged = [stage(array, "reducescatter")]
    return Handle(_scatter(staged, op, name, process_set, prescale_factor, postscale_factor), _first(_given(staged)))


def grouped_reducescatter_async(
    arrays: Iterable[Any],
    op: ReduceOp = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start grouped_reducescatter()."""
    staged = stage_all(arrays, "grouped_reducescatter")
    return Handle(_scatter(staged, op, name, process_set, prescale_factor, postscale_factor), _given(staged))


reducescatter = waits_for(
    reducescatter_async,
    "reducescatter",
    """Reduce `array` over the ranks and keep this rank's rows of dimension 0; the first n % size ranks get one row more.

    array: shape (n, ...), the same on every rank. Returns shape (n_r, ...). Errors as allreduce.
    """,
)
reduce_scatter = reducescatter
grouped_reducescatter = waits_for(
    grouped_reducescatter_async,
    "grouped_reducescatter",
    "reducescatter of a list of arrays: all or none, and together. Returns a list in the same order.",
)


# -- all-gather, broadcast, all-to-all


def _gather(staged: list[Staged], name: str | None, process_set: ProcessSet) -> Any:
    number = number_of(process_set, staged[0].what)
    return world.engine().allgather([s.buffer for s in staged], name=name or "", process_set=number, device=staged[0].device)


def allgather_async(array: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> Handle:
    """Start allgather()."""
    staged = [stage(array, "allgather")]
    return Handle(_gather(staged, name, process_set), _first(_given(staged)))


def grouped_allgather_async(
    arrays: Iterable[Any], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start grouped_allgather()."""
    staged = stage_all(arrays, "grouped_allgather")
    return Handle(_gather(staged, name, process_set), _given(staged))


allgather = waits_for(
    allgather_async,
    "allgather",
    """Concatenate every rank's array along dimension 0, in rank order.

    array: shape (n_r, ...); ranks may differ in n_r only. Scalars count as shape (1,). Returns shape (sum of n_r, ...).
    Errors as allreduce.
    """,
)
grouped_allgather = waits_for(
    grouped_allgather_async,
    "grouped_allgather",
    "allgather of a list of arrays: all or none, and together. Returns a list in the same order.",
)


def _broadcast(staged: Staged, buffer: Any, root_rank: int, name: str | None, process_set: ProcessSet) -> Any:
    number = number_of(process_set, staged.what)
    if not isinstance(root_rank, int) or root_rank not in process_set.ranks:
        ranks = f"a rank from 0 to {process_set.size() - 1}" if number == 0 else f"one of the ranks {process_set.ranks}"
        raise InvalidArgumentError(f"{staged.what}: expected root_rank to be {ranks}, got {root_rank!r}")
    return world.engine().broadcast(buffer, root_rank, name=name or "", process_set=number, device=staged.device)


def broadcast_async(
    array: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start broadcast()."""
    staged = stage(array, "broadcast")
    return Handle(_broadcast(staged, staged.own(), root_rank, name, process_set), staged.give)


def broadcast_async_(
    array: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start broadcast_(). The array belongs to the operation until it is done."""
    staged = stage(array, "broadcast_", in_place=True)
    return Handle(_broadcast(staged, staged.buffer, root_rank, name, process_set), lambda _: staged.write_back())


broadcast = waits_for(
    broadcast_async,
    "broadcast",
    """Root's `array` on every rank, as a new array. Shape and dtype are the same on every rank.

    root_rank: a rank of the job, also where a process set is given, which must have it. Errors as allreduce.
    """,
)
broadcast_ = waits_for(broadcast_async_, "broadcast_", "Overwrite `array` with root's and return it; see broadcast.")


def alltoall_async(
    array: Any,
    splits: Sequence[int] | np.ndarray | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start alltoall(). The handle's result is always a pair: the rows received, and how many came from each rank."""
    staged = stage(array, "alltoall")
    number = number_of(process_set, "alltoall")
    rows = None if splits is None else _rows(splits, staged, process_set.size())
    native = world.engine().alltoall(staged.buffer, rows, name=name or "", process_set=number, device=staged.device)
    return Handle(native, lambda pair: (staged.give(pair[0]), np.array(pair[1], dtype=np.int64)))


def _rows(splits: Any, staged: Staged, ranks: int) -> list[int]:
    given = np.asarray(splits)
    shape = staged.buffer.shape
    wrong = given.shape != (ranks,) or given.dtype.kind not in "iu" or (given < 0).any() or not len(shape)
    if wrong or int(given.sum()) != shape[0]:
        rows = f"{shape[0]} rows" if len(shape) else "the rows of an array of at least one dimension"
        raise InvalidArgumentError(f"alltoall: expected {ranks} splits that add up to {rows}, got {given.tolist()}")
    return given.tolist()


def alltoall(
    array: Any,
    splits: Sequence[int] | np.ndarray | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Part i of dimension 0 goes to the set's rank i; part i of the result comes from its rank i.

    splits: rows that go to each rank, whose sum is the array's; without them dimension 0 is divided evenly.
    Returns the rows received, and with splits a pair: those, and how many came from each rank. Errors as allreduce.
    """
    received, rows = alltoall_async(array, splits, name, process_set).wait()
    return received if splits is None else (received, rows)


# -- without arrays


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait for every rank of the set. With a time limit: `roundel.communicator().barrier(timeout=)`."""
    world.engine().barrier(process_set=number_of(process_set, "barrier")).wait()


def join(device: int = -1) -> int:
    """This rank has no more data: take part in what the others call, with zeros or no rows, until all have joined.

    device: where Horovod would make those zeros; only compared between ranks. Returns the rank that joined last, the one to
    broadcast from. Averages are still taken over all ranks. Use roundel.torch.join() beside a DistributedOptimizer.
    """
    return world.engine().join(device=device).wait()
