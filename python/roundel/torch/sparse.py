"""All-reduce of sparse tensors: the ranks' entries side by side. Indices that several ranks have come several times."""

from __future__ import annotations

import torch

from roundel import world
from roundel.errors import InvalidArgumentError
from roundel.ops import Average, ReduceOp, Sum
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.handles import Handle
from roundel.torch.staging import choose_op, device_of, give_all, number_of, stage_all

__all__ = ["SparseHandle", "sparse_allreduce_async"]


class SparseHandle(Handle):
    """Of sparse_allreduce_async: Horovod's scripts call it for the result."""

    def __call__(self) -> torch.Tensor:
        return self.wait()


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
) -> SparseHandle:
    """Start the all-reduce of a sparse COO tensor. `handle()`, or synchronize(handle), is the result: a sparse tensor of the
    same shape, not coalesced.

    tensor: any sparse shape and dtype, the same on every rank; ranks may differ in how many entries they have.
    op: Average (default) or Sum.
    """
    what = "sparse_allreduce_async"
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_coo:
        kind = f"one of layout {tensor.layout}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidArgumentError(f"{what}: expected a sparse COO tensor, got {kind}")
    op = choose_op(None, op, what)
    if op not in (Sum, Average):
        raise InvalidArgumentError(f"{what}: expected op to be Average or Sum, got {op.name}")
    # Entries become rows: all-gather joins along dimension 0.
    staged = stage_all([tensor._indices().t(), tensor._values()], what)
    number, ranks = number_of(process_set, what), process_set.size()
    native = world.engine().allgather(
        [s.buffer for s in staged], name=name or "", process_set=number, device=device_of(staged[0])
    )

    def finish(results: list[torch.Tensor]) -> torch.Tensor:
        indices, values = give_all(staged)(results)
        if op == Average:
            values = values / ranks if values.is_floating_point() else values.div(ranks, rounding_mode="trunc")
        return torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=True)

    return SparseHandle(native, finish)
