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
