"""The job as Horovod's scripts see it: init(), who is who, what was built in, the timeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from roundel import _core, world
from roundel.errors import InvalidArgumentError
from roundel.process_sets import ProcessSet, add_process_set, check_process_sets

__all__ = [
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
    "start_timeline",
    "stop_timeline",
]


def _refuse(comm: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"init: expected comm to be all ranks of the job in order, or a communicator of them, got {comm!r}; "
        "for a part of them make a process set: init(process_sets=[ProcessSet(ranks)])"
    )


def _check_comm(comm: Any) -> None:
    """After joining the job: is this all of it?"""
    if hasattr(comm, "Get_rank"):
        if (comm.Get_rank(), comm.Get_size()) != (world.rank(), world.size()):
            raise _refuse(comm)
    elif comm != list(range(world.size())):
        raise _refuse(comm)


def init(
    comm: Sequence[int] | Any | None = None,
    process_sets: Iterable[ProcessSet] | str | None = None,
    start_timeout: float | None = None,
) -> None:
    """Join the job that the launcher describes; a process that nothing launched is a job of one. Repeated calls join no other.

    comm: None or [] for all ranks of the job; a list of all its ranks, or an mpi4py communicator with the same ranks, is the
    same. process_sets: sets to add, the same on every rank (add_process_set for each that is not known yet), or "dynamic" for
    none; sets can be added later in either case.
    start_timeout: seconds to wait for all ranks; default ROUNDEL_START_TIMEOUT (60).
    Raises InvalidArgumentError, TimeoutError (names the missing ranks), HandshakeError, LaunchError.
    """
    if comm is not None and not hasattr(comm, "Get_rank"):
        if isinstance(comm, (str, bytes)) or not isinstance(comm, Iterable):
            raise _refuse(comm)
        comm = list(comm) or None
        if comm is not None and comm != list(range(len(comm))):
            raise _refuse(comm)
    if isinstance(process_sets, str):
        if process_sets.lower() != "dynamic":
            raise InvalidArgumentError(f"init: expected process_sets to be a list or 'dynamic', got {process_sets!r}")
        process_sets = None
    process_sets = check_process_sets(process_sets or [])
    was_initialized = world.is_initialized()
    world.init(start_timeout)
    try:
        if comm is not None:
            _check_comm(comm)
        check_process_sets(process_sets, world.size())
        for process_set in process_sets:
            if process_set.process_set_id is None:
                add_process_set(process_set)
    except InvalidArgumentError:
        if not was_initialized:
            world.shutdown()
        raise


def is_homogeneous() -> bool:
    """Every host has the same number of ranks."""
    return len(set(Counter(world.communicator().hosts).values())) == 1


def mpi_built() -> bool:
    """False: no MPI is needed or used."""
    return False


def mpi_enabled() -> bool:
    """False: no MPI is needed or used."""
    return False


def mpi_threads_supported() -> bool:
    """Raises InvalidArgumentError, a ValueError, as in a Horovod without MPI. A script may use an MPI of its own."""
    raise InvalidArgumentError("mpi_threads_supported: MPI is not in use: Roundel has transports of its own")


def gloo_built() -> bool:
    """True: what Horovod has Gloo for, jobs without MPI, is always there."""
    return True


def gloo_enabled() -> bool:
    """True: jobs run without MPI."""
    return True


def nccl_built() -> int:
    """0: NCCL is not used; CUDA tensors go through page-locked host memory."""
    return 0


def cuda_built() -> bool:
    """Whether the core was compiled with CUDA. CUDA tensors are taken in either case."""
    return not _core.info()["cuda"].startswith("built without")


def rocm_built() -> bool:
    """False."""
    return False


def ddl_built() -> bool:
    """False."""
    return False


def ccl_built() -> bool:
    """False."""
    return False


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Start writing a Chrome trace of this rank's operations to `file_path`; it opens in Perfetto.

    mark_cycles: also mark each batch that the engine executes. Raises RoundelError before init().
    """
    world.engine().start_timeline(file_path, mark_cycles)


def stop_timeline() -> None:
    """Finish the file of start_timeline()."""
    world.engine().stop_timeline()
