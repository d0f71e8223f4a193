"""All-gather of torch tensors in Horovod's forms: one tensor or a group, waiting or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from roundel import world
from roundel.ops import Average
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.allreduce import Reduction, reduce_differentiably
from roundel.torch.handles import Handle
from roundel.torch.staging import Staged, check_tensors, device_of, give_all, number_of, stage, stage_all

__all__ = ["allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async"]


def _start(staged: list[Staged], name: str, process_set: ProcessSet, finish: Callable[[list], Any]) -> Handle:
    number = number_of(process_set, "allgather")
    native = world.engine().allgather([s.buffer for s in staged], name=name, process_set=number, device=device_of(staged[0]))
    return Handle(native, finish)


def allgather_async(tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Handle:
    """Start allgather()."""
    staged = [stage(tensor, "allgather")]
    return _start(staged, name or "", process_set, lambda results: give_all(staged)(results)[0])


def grouped_allgather_async(
    tensors: Iterable[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start grouped_allgather()."""
    staged = stage_all(tensors, "grouped_allgather")
    return _start(staged, name or "", process_set, give_all(staged))


class _AllGather(torch.autograd.Function):
    """The gradient is this rank's rows of the averaged gradient, as in Horovod."""

    @staticmethod
    def forward(ctx, name: str, process_set: ProcessSet, *tensors: torch.Tensor):
        ctx.name, ctx.process_set, ctx.shapes = name, process_set, [tuple(tensor.shape) for tensor in tensors]
        staged = stage_all(tensors, "allgather")
        return tuple(_start(staged, name, process_set, give_all(staged)).wait())

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        name = ctx.name and ctx.name + ".grad"
        counts = [shape[0] if shape else 1 for shape in ctx.shapes]
        # Each row says whose it is: a rank that has joined has none.
        mine = torch.tensor([[ctx.process_set.rank(), *counts]], dtype=torch.int64)
        everyones = allgather_async(mine, name and name + ".rows", ctx.process_set)
        reduced = reduce_differentiably(gradients, Reduction(Average, name, process_set=ctx.process_set))
        before = [row[1:] for row in everyones.wait().tolist() if row[0] < ctx.process_set.rank()]
        begins = [sum(row[i] for row in before) for i in range(len(counts))]
        parts = zip(reduced, begins, counts, ctx.shapes, strict=True)
        return None, None, *(r.narrow(0, begin, count).reshape(shape) for r, begin, count, shape in parts)


def _differentiably(
    tensors: Iterable[torch.Tensor], name: str | None, process_set: ProcessSet, what: str
) -> list[torch.Tensor]:
    return list(_AllGather.apply(name or "", process_set, *check_tensors(tensors, what)))


def allgather(tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> torch.Tensor:
    """Concatenate every rank's tensor along dimension 0, in rank order.

    tensor: shape (n_r, ...); ranks may differ in n_r only. Scalars count as shape (1,). Returns shape (sum of n_r, ...).
    The gradient is this rank's rows of the averaged gradient, as in Horovod. Errors as allreduce.
    """
    return _differentiably([tensor], name, process_set, "allgather")[0]


def grouped_allgather(
    tensors: Iterable[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """allgather of a list of tensors: all or none, and together. Returns a list in the same order."""
    return _differentiably(tensors, name, process_set, "grouped_allgather")
