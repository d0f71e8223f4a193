"""Collectives on arrays of numpy and everything that speaks DLPack, on the communicator of all ranks."""

from __future__ import annotations

import numpy as np

from roundel.ops import Average, ReduceOp
from roundel.world import communicator

__all__ = ["allgather", "allreduce", "alltoall", "barrier", "broadcast", "reduce_scatter"]


def _contiguous(array):
    """C-contiguous: itself, or a copy. Scalars and lists become numpy arrays."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        array = np.asarray(array)
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return array.contiguous() if hasattr(array, "contiguous") else array


def allreduce(array, op: ReduceOp = Average, name: str = "", prescale_factor: float = 1.0, postscale_factor: float = 1.0):
    """Reduce `array` over all ranks; every rank gets the same new array.

    array: any shape, the same on every rank; float32, float64, float16, bfloat16, int8..int64, uint8 or bool.
    16-bit sums accumulate in float32 and round once; integer averages truncate.
    Raises MismatchError (differing shape, dtype, op or name), PeerLostError, TimeoutError.
    """
    return communicator().allreduce(_contiguous(array), op, name=name, prescale=prescale_factor, postscale=postscale_factor)


def reduce_scatter(array, op: ReduceOp = Average, name: str = ""):
    """Reduce `array` over ranks and keep this rank's rows of dimension 0; the first n % size ranks get one row more.

    array: shape (n, ...), the same on every rank. Returns shape (n_r, ...). Errors as allreduce.
    """
    return communicator().reduce_scatter(_contiguous(array), op, name=name)


def allgather(array, name: str = ""):
    """Concatenate every rank's array along dimension 0, in rank order.

    array: shape (n_r, ...); ranks may differ in n_r only. Scalars count as shape (1,). Returns shape (sum of n_r, ...).
    """
    array = _contiguous(array)
    comm = communicator()
    rows = np.array([array.shape[0] if len(array.shape) else 1], dtype=np.int64)
    return comm.allgather(array, comm.allgather(rows).tolist(), name=name)


def broadcast(array, root_rank: int = 0, name: str = ""):
    """Root's `array` on every rank, as a new array. Shape and dtype are the same on every rank."""
    array = _contiguous(array)
    copy = array.clone() if hasattr(array, "clone") else np.array(array)
    return communicator().broadcast(copy, root_rank, name=name)


def alltoall(array, name: str = ""):
    """Part i of dimension 0 goes to rank i; part i of the result comes from rank i. Dimension 0 is divisible by size."""
    return communicator().alltoall(_contiguous(array), name=name)


def barrier(timeout: float = 0.0) -> None:
    """Wait for every rank. timeout: seconds, 0 for ROUNDEL_TIMEOUT. Raises TimeoutError naming a missing rank."""
    communicator().barrier(timeout=timeout)
