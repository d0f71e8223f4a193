"""Broadcast of torch tensors in Horovod's forms: a new tensor or in place, waiting or not. Roots are ranks of the job."""

from __future__ import annotations

import torch

from roundel import world
from roundel.errors import InvalidArgumentError
from roundel.ops import Average
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.allreduce import Reduction, reduce_differentiably
from roundel.torch.handles import Handle, waits_for
from roundel.torch.staging import Staged, device_of, number_of, stage

__all__ = ["broadcast", "broadcast_", "broadcast_async", "broadcast_async_"]


def _start(staged: Staged, buffer: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet, what: str):
    number = number_of(process_set, what)
    if not isinstance(root_rank, int) or root_rank not in process_set.ranks:
        ranks = f"a rank from 0 to {process_set.size() - 1}" if number == 0 else f"one of the ranks {process_set.ranks}"
        raise InvalidArgumentError(f"{what}: expected root_rank to be {ranks}, got {root_rank!r}")
    return world.engine().broadcast(buffer, root_rank, name=name or "", process_set=number, device=device_of(staged))


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start broadcast(); the handle's result is a new tensor."""
    staged = stage(tensor, "broadcast")
    buffer = staged.buffer if staged.is_copy else staged.buffer.clone()
    return Handle(_start(staged, buffer, root_rank, name, process_set, "broadcast"), staged.give)


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start broadcast_(); the tensor belongs to the operation until it is done."""
    staged = stage(tensor, "broadcast_")
    native = _start(staged, staged.buffer, root_rank, name, process_set, "broadcast_")
    return Handle(native, lambda _: staged.write_back())


broadcast_ = waits_for(
    broadcast_async_, "broadcast_", "Overwrite `tensor` with root's, in place, and return it; see broadcast."
)


class _Broadcast(torch.autograd.Function):
    """The gradient is averaged to root and zero elsewhere, as in Horovod."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet):
        ctx.root_rank, ctx.name, ctx.process_set = root_rank, name and name + ".grad", process_set
        return broadcast_async(tensor, root_rank, name, process_set).wait()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (reduced,) = reduce_differentiably([gradient], Reduction(Average, ctx.name or "", process_set=ctx.process_set))
        if (
            world.rank() != ctx.root_rank
        ):  # zeros that remember where they come from: the ranks' second derivatives meet as well
            reduced = reduced.masked_fill(torch.ones_like(reduced, dtype=torch.bool), 0)
        return reduced, None, None, None


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Root's tensor on every rank, as a new tensor. Shape and dtype are the same on every rank.

    root_rank: a rank of the job, also where the process set is a part of it. The gradient is averaged to root and zero
    elsewhere, as in Horovod. Errors as allreduce.
    """
    return _Broadcast.apply(tensor, root_rank, name, process_set)
