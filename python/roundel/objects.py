"""Python objects between ranks: pickled, so only members of one job, who trust each other, exchange them.

A function or class of the script itself is taken by cloudpickle where that is installed.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from roundel import world
from roundel.collectives import allgather_async, broadcast_
from roundel.process_sets import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object"]


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


def broadcast_object(
    obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Root's `obj` on every rank of the set; root gets its own back. obj: anything that pickles, ignored elsewhere.

    root_rank: a rank of the job. Raises what pickling raises (on root, before the others wait), and as broadcast.
    """
    at_root = world.rank() == root_rank
    data = np.frombuffer(_dumps(obj), np.uint8) if at_root else None
    size = broadcast_(np.array([0 if data is None else data.size]), root_rank, name and name + ".size", process_set)
    buffer = data.copy() if data is not None else np.empty(size[0], np.uint8)
    broadcast_(buffer, root_rank, name and name + ".data", process_set)
    return obj if at_root else pickle.loads(buffer)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Every rank's `obj`, as a list in rank order. obj: anything that pickles. Errors as allgather."""
    data = np.frombuffer(_dumps(obj), np.uint8)
    sizes = allgather_async(np.array([data.size]), name and name + ".sizes", process_set)
    everything = allgather_async(data, name and name + ".data", process_set).wait()
    ends = np.cumsum(sizes.wait())
    return [pickle.loads(everything[end - size : end]) for end, size in zip(ends, sizes.wait(), strict=True)]
