"""torch.distributed's gloo, called as its users do."""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist
from roundel.ops import ReduceOp

OPS = {ReduceOp.Sum: dist.ReduceOp.SUM, ReduceOp.Product: dist.ReduceOp.PRODUCT, ReduceOp.Min: dist.ReduceOp.MIN,
       ReduceOp.Max: dist.ReduceOp.MAX, ReduceOp.Average: dist.ReduceOp.AVG}  # fmt: skip


class Library:
    """The default process group."""

    def __init__(self, directory: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(os.path.join(directory, "gloo.store"), self.size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        self.barrier, self.finish = dist.barrier, dist.destroy_process_group

    def version(self) -> str:
        return f"gloo of torch {torch.__version__}"

    def forms(self, collective: str) -> tuple[str, ...]:
        """Its all-reduce is always in place."""
        return ("in_place",) if collective == "allreduce" else ("private",)

    def call(self, collective: str):
        """A Collective's call: (comm, x, out, op); x is out where it works in place."""
        return functools.partial(self._call, collective)

    def _call(self, collective: str, _, x, out, op):
        x, out = torch.as_tensor(x), torch.as_tensor(out)
        if collective == "allreduce":
            return functools.partial(dist.all_reduce, out, OPS[op])
        if collective == "reduce_scatter":
            return functools.partial(dist.reduce_scatter_tensor, out, x, OPS[op])
        if collective == "allgather":
            return functools.partial(dist.all_gather_into_tensor, out, x)
        if collective == "broadcast":
            return functools.partial(dist.broadcast, out, 0)
        return functools.partial(dist.all_to_all_single, out, x)
