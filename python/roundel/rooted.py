"""Operations with a root on arrays of numpy and everything that speaks DLPack, on the communicator of all ranks.

They are not Horovod's, and ordered: every rank calls them in the same order.
"""

from __future__ import annotations

import numpy as np

from roundel.errors import InvalidArgumentError
from roundel.ops import Average, ReduceOp
from roundel.world import communicator

__all__ = ["gather", "reduce", "scatter"]


_REFUSED = b"!"  # of scatter's header; no shape begins with it


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


def _reserved(what: str, name: str) -> str:
    """A name for a step that is not the user's: it must not meet an operation of theirs."""
    return f"{what} ({name})" if name else what


def _rows_of_all(comm, array, what: str, name: str) -> list[int]:
    comm.check_array(array)  # before the others wait for this rank's part
    rows = np.array([array.shape[0] if len(array.shape) else 1], dtype=np.int64)
    return comm.allgather(rows, name=_reserved(f"{what}: rows", name)).tolist()


def reduce(array, root_rank: int = 0, op: ReduceOp = Average, name: str = ""):
    """Reduce `array` over all ranks; root gets the result as a new array, the others None. Shapes and errors as allreduce."""
    return communicator().reduce(_contiguous(array), root_rank, op, name=name)


def gather(array, root_rank: int = 0, name: str = ""):
    """As allgather, at root; the others get None."""
    array = _contiguous(array)
    comm = communicator()
    if not 0 <= root_rank < comm.size:
        raise InvalidArgumentError(f"rank {comm.rank}: gather: expected a rank from 0 to {comm.size - 1}, got {root_rank}")
    return comm.gather(array, root_rank, _rows_of_all(comm, array, "gather", name), name=name)


def scatter(array, root_rank: int = 0, name: str = ""):
    """Root's rows of dimension 0, divided among the ranks; the first n % size get one row more.

    array: at root shape (n, ...), ignored elsewhere. Returns shape (n_r, ...): a tensor where root has one, else numpy.
    Raises InvalidArgumentError on every rank when root's array is refused.
    """
    comm = communicator()
    text = b""
    if comm.rank == root_rank:
        # What is wrong with root's array is told in place of its shape: the others wait for one of them.
        refusal = None
        try:
            array = _contiguous(array)
            comm.check_array(array)
            if not len(array.shape):
                raise InvalidArgumentError("scatter's input: expected at least one dimension, got a scalar")
            text = f"{tuple(array.shape)} {array.dtype}".encode()
        except Exception as error:
            refusal, text = error, _REFUSED + str(error).encode()
    else:
        array = None
    # The length of the text, then the text: the dimensions and the name of the dtype.
    length = comm.broadcast(np.array([len(text)]), root_rank, name=_reserved("scatter: length", name))
    text = np.frombuffer(text.ljust(length[0], b"?"), np.uint8).copy()
    comm.broadcast(text, root_rank, name=_reserved("scatter: shape", name))
    text = text.tobytes()
    if text.startswith(_REFUSED):
        reason = text.removeprefix(_REFUSED).decode()
        message = f"rank {comm.rank}: scatter: the array of root {root_rank} is refused: {reason}"
        raise InvalidArgumentError(message) from (refusal if comm.rank == root_rank else None)
    shape, _, dtype = text.decode().rpartition(" ")
    shape = [int(n) for n in shape.strip("()").split(",") if n.strip()]
    rows = [shape[0] // comm.size + (r < shape[0] % comm.size) for r in range(comm.size)]
    out = None
    if array is None:
        out = _empty([rows[comm.rank], *shape[1:]], dtype)
    return comm.scatter(array, root_rank, rows, out=out, name=name)
