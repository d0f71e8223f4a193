"""Reduce-scatter of torch tensors in Horovod's forms: one tensor or a group, waiting or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from roundel import world
from roundel.errors import InvalidArgumentError
from roundel.ops import Adasum, Average, ReduceOp, Sum
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.allgather import grouped_allgather
from roundel.torch.allreduce import Reduction
from roundel.torch.compression import Compression, Compressor
from roundel.torch.handles import Handle
from roundel.torch.staging import Staged, check_tensors, choose_op, device_of, give_all, stage_all

__all__ = ["grouped_reducescatter", "grouped_reducescatter_async", "reducescatter", "reducescatter_async"]


def _check(tensors: Iterable[torch.Tensor], what: str) -> list[torch.Tensor]:
    tensors = check_tensors(tensors, what)
    if any(tensor.dim() == 0 for tensor in tensors):
        raise InvalidArgumentError(f"{what}: expected tensors of at least one dimension, got a scalar")
    return tensors


def _choose(op: ReduceOp | None, what: str) -> ReduceOp:
    op = choose_op(None, op, what)
    if op == Adasum:
        raise InvalidArgumentError(f"{what}: expected Average, Sum, Min, Max or Product, got Adasum")
    return op


def _start(staged: list[Staged], how: Reduction, finish: Callable[[list], Any]) -> Handle:
    native = world.engine().reduce_scatter([s.buffer for s in staged], how.op, **how.arguments, device=device_of(staged[0]))
    return Handle(native, finish)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start reducescatter()."""
    what = "reducescatter"
    how = Reduction(_choose(op, what), name or "", prescale_factor, postscale_factor, process_set)
    staged = stage_all(_check([tensor], what), what)
    return _start(staged, how, lambda results: give_all(staged)(results)[0])


def grouped_reducescatter_async(
    tensors: Iterable[torch.Tensor],
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start grouped_reducescatter()."""
    what = "grouped_reducescatter"
    how = Reduction(_choose(op, what), name or "", prescale_factor, postscale_factor, process_set)
    staged = stage_all(_check(tensors, what), what)
    return _start(staged, how, give_all(staged))


class _ReduceScatter(torch.autograd.Function):
    """The gradient is everybody's rows side by side; times the number of ranks for a sum, as in Horovod."""

    @staticmethod
    def forward(ctx, how: Reduction, *tensors: torch.Tensor):
        ctx.how = how
        staged = stage_all(tensors, "reducescatter")
        return tuple(_start(staged, how, give_all(staged)).wait())

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        how: Reduction = ctx.how
        if how.op not in (Sum, Average):
            raise InvalidArgumentError(f"the gradient of reducescatter is that of Sum or Average, not of {how.op.name}")
        factor = how.prescale * how.postscale * (how.process_set.size() if how.op == Sum else 1)
        rows = [gradient * factor for gradient in gradients]
        return None, *grouped_allgather(rows, how.of_gradient.name, how.process_set)


def _differentiably(tensors: Sequence[torch.Tensor], how: Reduction, compression: type[Compressor]) -> list[torch.Tensor]:
    pairs = [compression.compress(tensor) for tensor in tensors]
    reduced = _ReduceScatter.apply(how, *(wire for wire, _ in pairs))
    return [compression.decompress(result, context) for result, (_, context) in zip(reduced, pairs, strict=True)]


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce `tensor` over ranks and keep this rank's rows of dimension 0; the first n % size ranks get one row more.

    tensor: shape (n, ...), the same on every rank. Returns shape (n_r, ...). op: Average (default), Sum, Min, Max or Product.
    Differentiable for Average and Sum. Errors as allreduce.
    """
    what = "reducescatter"
    how = Reduction(_choose(op, what), name or "", prescale_factor, postscale_factor, process_set)
    return _differentiably(_check([tensor], what), how, compression)[0]


def grouped_reducescatter(
    tensors: Iterable[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """reducescatter of a list of tensors: all or none, and together. Returns a list in the same order."""
    what = "grouped_reducescatter"
    how = Reduction(_choose(op, what), name or "", prescale_factor, postscale_factor, process_set)
    return _differentiably(_check(tensors, what), how, compression)
