"""MPI through mpi4py, called in the fastest way that it offers: buffers with their types made beforehand."""

from __future__ import annotations

import functools

import mpi4py

mpi4py.rc.threads = False  # MPI_Init: no locks for threads that do not call it

from mpi4py import MPI  # noqa: E402
from roundel.ops import ReduceOp  # noqa: E402

OPS = {ReduceOp.Sum: MPI.SUM, ReduceOp.Product: MPI.PROD, ReduceOp.Min: MPI.MIN, ReduceOp.Max: MPI.MAX}
TYPES = {
    "float32": MPI.FLOAT, "float64": MPI.DOUBLE, "int8": MPI.INT8_T, "int16": MPI.INT16_T, "int32": MPI.INT32_T,
    "int64": MPI.INT64_T, "uint8": MPI.UINT8_T,
}  # fmt: skip


class Library:
    """MPI_COMM_WORLD."""

    def __init__(self, directory: str) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.size, self.barrier, self.finish = self._comm.rank, self._comm.size, self._comm.Barrier, MPI.Finalize

    def version(self) -> str:
        first = MPI.Get_library_version().split(",")[0].split("\n")[0]
        return " ".join(first.replace("Version:", "").split()).strip("\0")

    def forms(self, collective: str) -> tuple[str, ...]:
        """Those that it can do; the first is compared with private buffers."""
        return ("private", "in_place") if collective == "allreduce" else ("private",)

    def call(self, collective: str):
        """A Collective's call: (comm, x, out, op); x is out where it works in place."""
        return functools.partial(self._call, collective)

    def _call(self, collective: str, _, x, out, op):
        comm = self._comm
        if collective == "broadcast":
            return functools.partial(comm.Bcast, _buffer(out), 0)
        send, receive = MPI.IN_PLACE if x is out else _buffer(x), _buffer(out)
        if collective == "allreduce":
            return functools.partial(comm.Allreduce, send, receive, _operator(op))
        if collective == "reduce_scatter":
            return functools.partial(comm.Reduce_scatter_block, send, receive, _operator(op))
        if collective == "allgather":
            return functools.partial(comm.Allgather, send, receive)
        return functools.partial(comm.Alltoall, send, receive)


def _buffer(array) -> list:
    name = str(getattr(array, "dtype", "")).removeprefix("torch.")
    if name not in TYPES:
        raise NotImplementedError(f"MPI has no {name}")
    return [MPI.memory.frombuffer(array), TYPES[name]]  # mpi4py finds the count: of a block, where there are blocks


def _operator(op):
    if op not in OPS:
        raise NotImplementedError("MPI has no average")
    return OPS[op]
