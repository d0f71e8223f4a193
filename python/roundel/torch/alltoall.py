"""All-to-all of torch tensors in Horovod's forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundel import world
from roundel.errors import InvalidArgumentError
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.handles import Handle
from roundel.torch.staging import device_of, number_of, stage

__all__ = ["alltoall", "alltoall_async"]


def _rows(splits: torch.Tensor | Sequence[int] | None, tensor: torch.Tensor, ranks: int) -> list[int] | None:
    """The rows for each rank. Raises InvalidArgumentError where they are not those of the tensor."""
    if not tensor.dim():
        raise InvalidArgumentError("alltoall: expected a tensor of at least one dimension, got a scalar")
    rows = tensor.shape[0]
    if splits is None:
        if rows % ranks:
            raise InvalidArgumentError(f"alltoall: {rows} rows cannot be divided evenly among {ranks} ranks: give splits")
        return None
    if isinstance(splits, torch.Tensor):
        if splits.dim() != 1 or splits.is_floating_point() or splits.is_complex() or splits.dtype == torch.bool:
            raise InvalidArgumentError(
                f"alltoall: expected splits to be a list of integers, got {splits.dtype} of shape {tuple(splits.shape)}"
            )
        splits = splits.tolist()
    splits = list(splits)
    wrong = len(splits) != ranks or any(not isinstance(n, int) or n < 0 for n in splits) or sum(splits) != rows
    if wrong:
        raise InvalidArgumentError(f"alltoall: expected {ranks} splits that add up to {rows} rows, got {splits}")
    return splits


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start alltoall(). The handle's result is always a pair: the rows received, and how many came from each rank."""
    staged = stage(tensor, "alltoall")
    number = number_of(process_set, "alltoall")
    rows = _rows(splits, tensor, process_set.size())
    like = splits if isinstance(splits, torch.Tensor) else torch.empty(0, dtype=torch.int32)
    native = world.engine().alltoall(staged.buffer, rows, name=name or "", process_set=number, device=device_of(staged))
    return Handle(native, lambda pair: (staged.give(pair[0]), torch.tensor(pair[1], dtype=like.dtype, device=like.device)))


class _AllToAll(torch.autograd.Function):
    """The gradient goes back the way the rows came."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, splits, name: str | None, process_set: ProcessSet):
        received, received_splits = alltoall_async(tensor, splits, name, process_set).wait()
        ctx.splits, ctx.name, ctx.process_set = received_splits, name and name + ".grad", process_set
        ctx.mark_non_differentiable(received_splits)
        return received, received_splits

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _):
        back, _ = _AllToAll.apply(gradient, ctx.splits, ctx.name, ctx.process_set)
        return back, None, None, None


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Part i of dimension 0 goes to rank i; part i of the result comes from rank i.

    tensor: shape (n_r, ...); ranks may differ in n_r only.
    splits: how many rows go to each rank, as integers or an integer tensor; without them dimension 0 is divided evenly.
    Returns the rows received; with splits a pair: those, and how many rows came from each rank (a tensor of the dtype and on
    the device of `splits`, else int32 on the CPU). Differentiable. Errors as allreduce.
    """
    received, received_splits = _AllToAll.apply(tensor, splits, name, process_set)
    return received if splits is None else (received, received_splits)
