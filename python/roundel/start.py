"""init() with Horovod's arguments: which ranks, which process sets, how long to wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from roundel import world
from roundel.errors import InvalidArgumentError
from roundel.launch.detect import is_launched_without_mpi
from roundel.process_sets import ProcessSet, add_process_set, check_process_sets

__all__ = ["init"]


def init(
    comm: Sequence[int] | Any | None = None,
    process_sets: Iterable[ProcessSet] | str | None = None,
    start_timeout: float | None = None,
) -> None:
    """Join the job that the launcher describes; a process that nothing launched is a job of one. Repeated calls join no other.

    Knows roundelrun, torchrun, mpirun of MPICH's kind and of Open MPI, and plain variables: ROUNDEL_RANK, ROUNDEL_SIZE,
    ROUNDEL_RENDEZVOUS=host:port of rank 0,
    ROUNDEL_TOKEN_FILE (32 secret bytes, mode 0600) and optionally ROUNDEL_LOCAL_RANK, ROUNDEL_LOCAL_SIZE.

    comm: None or [] for all ranks of the job; a list of all its ranks is the same. A part of the ranks is refused: make a
    process set of it. An mpi4py communicator: its ranks are the job, and all of them call this (under roundelrun or torchrun
    it must have all of the job's).
    process_sets: ProcessSet objects to add (add_process_set() for each that is not known yet), the same on every rank; or
    "dynamic" for none. Sets can be added later in either case.
    start_timeout: seconds to wait for all ranks; default ROUNDEL_START_TIMEOUT (60).
    Raises InvalidArgumentError, TimeoutError (names the missing ranks), HandshakeError, LaunchError (the variables make no
    sense).
    """
    comm = _checked(comm)
    if isinstance(process_sets, str):
        if process_sets.lower() != "dynamic":
            raise InvalidArgumentError(f"init: expected process_sets to be a list or 'dynamic', got {process_sets!r}")
        process_sets = None
    process_sets = check_process_sets(process_sets or [])
    was_initialized = world.is_initialized()
    world.init(start_timeout, lambda size: _check_all(comm, None, size), comm if _makes_job(comm) else None)
    try:
        _check_all(comm, world.rank(), world.size())
        for process_set in check_process_sets(process_sets, world.size()):
            if process_set.process_set_id is None:
                add_process_set(process_set)
    except InvalidArgumentError:
        if not was_initialized:
            world.shutdown()
        raise


def _checked(comm: Any) -> list[int] | Any | None:
    """None for everybody, a list of ranks, or something with MPI's Get_rank and Get_size."""
    if comm is None or hasattr(comm, "Get_rank"):
        return comm
    if isinstance(comm, (str, bytes)) or not isinstance(comm, Iterable):
        raise _refusal(comm)
    return list(comm) or None


def _makes_job(comm: Any) -> bool:
    """A communicator of mpi4py itself, where no launcher of another kind has said who the ranks are."""
    return type(comm).__module__.partition(".")[0] == "mpi4py" and not is_launched_without_mpi()


def _check_all(comm: Any, rank: int | None, size: int) -> None:
    """Is that all of the job? rank: None while it is not known, before the ranks have met."""
    if isinstance(comm, list):
        if comm != list(range(size)):
            raise _refusal(comm)
    elif comm is not None and (comm.Get_size() != size or rank not in (None, comm.Get_rank())):
        raise _refusal(comm)


def _refusal(comm: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"init: expected comm to be all ranks of the job in order, or a communicator of them, got {comm!r}; "
        "for a part of them make a process set: init(process_sets=[ProcessSet(ranks)])"
    )
