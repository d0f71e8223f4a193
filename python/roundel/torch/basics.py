"""The job as Horovod's scripts see it: init(), who is who, what was built in."""

from __future__ import annotations

from collections import Counter

from roundel import _core, world
from roundel.errors import InvalidArgumentError
from roundel.start import init

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
]


def is_homogeneous() -> bool:
    """Every host has the same number of ranks."""
    return len(set(Counter(world.communicator().hosts).values())) == 1


def mpi_built() -> bool:
    """True: every build can use an MPI library, which it opens when a job is started through MPI."""
    return True


def mpi_enabled() -> bool:
    """Whether this job's ranks have met through MPI: under Open MPI's mpirun, with ROUNDEL_TRANSPORT=mpi, or by init(comm)."""
    return world.met_by_mpi()


def mpi_threads_supported() -> bool:
    """Whether several threads may call MPI at a time: a script's own, say, beside Roundel's.

    Raises InvalidArgumentError, a ValueError, where this process uses no MPI, as Horovod does.
    """
    threads = _core.mpi_threads()
    if threads is None:
        raise InvalidArgumentError("mpi_threads_supported: MPI is not in use in this process")
    return threads == "MPI_THREAD_MULTIPLE"


def gloo_built() -> bool:
    """True: what Horovod has Gloo for, jobs without MPI, is always there."""
    return True


def gloo_enabled() -> bool:
    """Whether this job runs without MPI."""
    return not world.met_by_mpi()


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
