"""Collectives on arrays of numpy and everything that speaks DLPack, on the communicator of all ranks."""

from __future__ import annotations

import numpy as np

from roundel.ops import Average, ReduceOp
from roundel.world import communicator

__all__ = [
    "allgather",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "grouped_allreduce",
    "reduce",
    "reduce_scatter",
    "scatter",
]


def _contiguous(array):
    """C-contiguous: itself, or a copy. Scalars and lists become numpy arrays."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        array = np.asarray(array)
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return array.contiguous() if hasattr(array, "contiguous") else array


def _empty(shape, dtype: str):
    """dtype: "float32" for a numpy array, "torch.float32" for a tensor."""
    library, _, name = dtype.rpartition(".")
    if not library:
        return np.empty(shape, name)
    import torch

    return torch.empty(shape, dtype=getattr(torch, name))


def _rows_of_all(comm, array) -> list[int]:
    rows = np.array([array.shape[0] if len(array.shape) else 1], dtype=np.int64)
    return comm.allgather(rows).tolist()


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
    return comm.allgather(array, _rows_of_all(comm, array), name=name)


def broadcast(array, root_rank: int = 0, name: str = ""):
    """Root's `array` on every rank, as a new array. Shape and dtype are the same on every rank."""
    array = _contiguous(array)
    copy = array.clone() if hasattr(array, "clone") else np.array(array)
    return communicator().broadcast(copy, root_rank, name=name)


def grouped_allreduce(
    arrays, op: ReduceOp = Average, name: str = "", prescale_factor: float = 1.0, postscale_factor: float = 1.0
):
    """allreduce of a list of arrays, all or none; small ones travel together. Returns a list in the same order."""
    return communicator().grouped_allreduce(
        [_contiguous(array) for array in arrays], op, name=name, prescale=prescale_factor, postscale=postscale_factor
    )


def reduce(array, root_rank: int = 0, op: ReduceOp = Average, name: str = ""):
    """Reduce `array` over all ranks; root gets the result as a new array, the others None. Shapes and errors as allreduce."""
    return communicator().reduce(_contiguous(array), root_rank, op, name=name)


def gather(array, root_rank: int = 0, name: str = ""):
    """As allgather, at root; the others get None."""
    array = _contiguous(array)
    comm = communicator()
    return comm.gather(array, root_rank, _rows_of_all(comm, array), name=name)


def scatter(array, root_rank: int = 0, name: str = ""):
    """Root's rows of dimension 0, divided among the ranks; the first n % size get one row more.

    array: at root shape (n, ...), ignored elsewhere. Returns shape (n_r, ...): a tensor where root has one, else numpy.
    """
    comm = communicator()
    array = _contiguous(array) if comm.rank == root_rank else None
    # Shape and dtype first: two numbers, then the dimensions and the name of the dtype.
    text = f"{tuple(array.shape)} {array.dtype}".encode() if array is not None else b""
    length = comm.broadcast(np.array([len(text)]), root_rank, name=name and f"{name} (length)")
    text = np.frombuffer(text.ljust(length[0], b"?"), np.uint8).copy()
    comm.broadcast(text, root_rank, name=name and f"{name} (shape)")
    shape, _, dtype = text.tobytes().decode().rpartition(" ")
    shape = [int(n) for n in shape.strip("()").split(",") if n.strip()]
    rows = [shape[0] // comm.size + (r < shape[0] % comm.size) for r in range(comm.size)]
    out = None
    if array is None:
        out = _empty([rows[comm.rank], *shape[1:]], dtype)
    return comm.scatter(array, root_rank, rows, out=out, name=name)


def alltoall(array, splits=None, name: str = ""):
    """Part i of dimension 0 goes to rank i; part i of the result comes from rank i.

    splits: rows that go to each rank; without them dimension 0 is divisible by size and divided evenly.
    """
    return communicator().alltoall(_contiguous(array), splits=splits, name=name)


def barrier(timeout: float = 0.0) -> None:
    """Wait for every rank. timeout: seconds, 0 for ROUNDEL_TIMEOUT. Raises TimeoutError naming the missing ranks."""
    communicator().barrier(timeout=timeout)
