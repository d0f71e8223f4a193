"""The job that this process belongs to: init(), shutdown(), and who is who."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from roundel import _core
from roundel.errors import RoundelError
from roundel.launch.detect import detect, finish

__all__ = [
    "communicator",
    "cross_rank",
    "cross_size",
    "engine",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "met_by_mpi",
    "rank",
    "shutdown",
    "size",
]


@dataclass(frozen=True)
class _World:
    comm: _core.Communicator
    engine: _core.Engine
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    mpi: _core.MpiJob | None = None  # where the ranks have met through MPI


_world: _World | None = None
_lock = threading.Lock()


def _place(comm: _core.Communicator, local_rank: int | None, local_size: int | None) -> _World:
    """Who this rank is on its host (local) and among the ranks with the same local rank (cross)."""
    hosts = comm.hosts
    seen: dict[int, int] = {}
    local_ranks = []
    for host in hosts:
        local_ranks.append(seen.get(host, 0))
        seen[host] = local_ranks[-1] + 1
    mine, here = local_ranks[comm.rank], hosts[comm.rank]
    alike = [r for r in range(comm.size) if local_ranks[r] == mine]
    return _World(
        comm=comm,
        engine=_core.Engine(comm),
        rank=comm.rank,
        size=comm.size,
        # Launchers that say it know better: two agents may share a host, each with its own devices.
        local_rank=mine if local_rank is None else local_rank,
        local_size=seen[here] if local_size is None else local_size,
        cross_rank=alike.index(comm.rank),
        cross_size=len(alike),
    )


def init(start_timeout: float | None = None, check: Callable[[int], None] | None = None, comm: Any = None) -> None:
    """What roundel.init() (start.py) does once it knows that all ranks are wanted. Repeated calls do nothing.

    comm: an mpi4py communicator whose ranks are the job, whoever has started them.
    check: is told the job's size before the ranks meet, and may raise.
    """
    global _world
    with _lock:
        if _world is not None:
            return
        job = detect(comm=comm)
        if check is not None:
            check(1 if job is None else job.size)
        if job is None:
            _world = _place(_core.Communicator.open(0, 1), None, None)
            return
        try:
            comm = _core.Communicator.open(
                job.rank,
                job.size,
                job.rendezvous,
                rendezvous_fd=-1 if job.rendezvous_fd is None else job.rendezvous_fd,
                token=job.token,
                epoch=job.epoch,
                start_timeout=start_timeout or 0.0,
                mpi=job.mpi,
            )
        finally:
            job.token[:] = bytes(len(job.token))  # used: the core has wiped its copies too
        _world = replace(_place(comm, job.local_rank, job.local_size), mpi=job.mpi)


def shutdown() -> None:
    """Leave the job. Operations of other ranks that still need this one fail with PeerLostError. init() may follow."""
    global _world
    with _lock:
        world, _world = _world, None
    if world is not None and not _core.in_forked_child():
        world.engine.close()
        world.comm.shutdown()


def _end() -> None:
    shutdown()
    finish()


atexit.register(_end)


def is_initialized() -> bool:
    """True between init() and shutdown()."""
    return _world is not None


def _get() -> _World:
    if _world is None:
        raise RoundelError("roundel is not initialized: call init() first")
    return _world


def communicator() -> _core.Communicator:
    """The communicator of all ranks. Raises RoundelError before init()."""
    return _get().comm


def engine() -> _core.Engine:
    """The engine of all ranks: named requests in any order. Raises RoundelError before init()."""
    return _get().engine


def met_by_mpi() -> bool:
    """The job's ranks have met through MPI, which may carry its data too. False before init()."""
    return _world is not None and _world.mpi is not None


def rank() -> int:
    """This process's number among all, from 0."""
    return _get().rank


def size() -> int:
    """How many processes there are."""
    return _get().size


def local_rank() -> int:
    """This process's number among those of its host; the launcher's, or counted from the hosts that the ranks are on."""
    return _get().local_rank


def local_size() -> int:
    """How many processes this host has."""
    return _get().local_size


def cross_rank() -> int:
    """This host's number among the hosts that have a process with this local rank."""
    return _get().cross_rank


def cross_size() -> int:
    """How many hosts have a process with this local rank."""
    return _get().cross_size
