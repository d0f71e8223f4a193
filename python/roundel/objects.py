"""Python objects between ranks. They travel by pickle, which runs code of the sender's choice: ranks of a job trust each other.

An object that pickle does not take (a function of the script itself) goes by cloudpickle, where that is installed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from roundel import world
from roundel.collectives import allgather, broadcast_
from roundel.errors import RoundelError
from roundel.process_sets import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn"]


def _dumps(obj: Any) -> bytes:
    try:
        return pickle.dumps(obj)
    except Exception:
        try:
            import cloudpickle
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        return cloudpickle.dumps(obj)


def _attempt(obj: Any) -> tuple[np.ndarray, int, Exception | None]:
    """The bytes, how many, and what pickling raised: then -1 of them, which the others are told in place of a length."""
    try:
        data = np.frombuffer(_dumps(obj), np.uint8)
    except Exception as problem:
        return np.empty(0, np.uint8), -1, problem
    return data, data.size, None


def broadcast_object(
    obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Root's object on every rank of the set; root gets its own back. root_rank: a rank of the job.

    What pickle raises is raised on root, and a RoundelError elsewhere; the job goes on. Other errors as broadcast.
    """
    label, at_root = name or "object", world.rank() == root_rank
    data, length, problem = _attempt(obj) if at_root else (None, 0, None)
    length = int(broadcast_(np.array([length]), root_rank, label + ".size", process_set)[0])
    if problem is not None:
        raise problem
    if length < 0:
        raise RoundelError(f"rank {world.rank()}: broadcast_object: rank {root_rank} could not pickle its object")
    received = broadcast_(np.empty(length, np.uint8) if data is None else data.copy(), root_rank, label, process_set)
    return obj if at_root else pickle.loads(received)


def broadcast_object_fn(
    root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Callable[[Any], Any]:
    """broadcast_object with its other arguments given: a function of the object."""
    return lambda obj: broadcast_object(obj, root_rank, name, process_set)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Every rank's object, in rank order; this rank's own is itself. A rank that has joined has none.

    What pickle raises is raised on the rank whose object it is, and a RoundelError elsewhere; the job goes on.
    """
    label = name or "objects"
    data, length, problem = _attempt(obj)
    mine = np.array([[world.rank(), length]])
    lengths = allgather(mine, label + ".sizes", process_set).tolist()
    everything = allgather(data, label, process_set)
    if problem is not None:
        raise problem
    failed = [str(rank) for rank, n in lengths if n < 0]
    if failed:
        raise RoundelError(f"rank {world.rank()}: allgather_object: rank {', '.join(failed)} could not pickle its object")
    ends = np.cumsum([n for _, n in lengths])
    parts = zip(lengths, ends, strict=True)
    return [obj if rank == world.rank() else pickle.loads(everything[end - n : end]) for (rank, n), end in parts]
