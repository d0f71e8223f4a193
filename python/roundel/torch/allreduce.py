"""All-reduce of torch tensors in Horovod's forms: one tensor or a group, new tensors or in place, waiting or not.

All go through one request to the engine; a group is a request of several tensors, which is done for all or for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from roundel import world
from roundel.ops import ReduceOp
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.compression import Compression, Compressor
from roundel.torch.handles import Handle, waits_for
from roundel.torch.staging import (
    Staged,
    changed,
    check_tensors,
    choose_op,
    device_of,
    give_all,
    is_used_itself,
    number_of,
    stage,
    stage_all,
)

__all__ = [
    "Reduction",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "reduce_differentiably",
]


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)


class Reduction(NamedTuple):
    """How to reduce: the arguments that all forms share."""

    op: ReduceOp
    name: str = ""
    prescale: float = 1.0
    postscale: float = 1.0
    process_set: ProcessSet = global_process_set

    @property
    def arguments(self) -> dict[str, Any]:
        """As the engine takes them."""
        number = number_of(self.process_set, "process_set")
        return {"prescale": self.prescale, "postscale": self.postscale, "name": self.name, "process_set": number}

    @property
    def of_gradient(self) -> Reduction:
        """The same reduction, named as the gradient's."""
        return self._replace(name=self.name and self.name + ".grad")


def _start(staged: list[Staged], how: Reduction, in_place: bool, finish: Callable[[list], Any]) -> Handle:
    sources = [s.buffer for s in staged]
    # Nobody reads a copy as it is after this: the result can be made there.
    outs = sources if in_place else [s.buffer if s.is_copy else _empty_like(s.buffer) for s in staged]
    native = world.engine().allreduce(sources, outs, how.op, **how.arguments, device=device_of(staged[0]))
    return Handle(native, finish)


def _written(staged: list[Staged]) -> Callable[[list], list[torch.Tensor]]:
    return lambda _: [s.write_back() for s in staged]


def _first(finish: Callable[[list], list[torch.Tensor]]) -> Callable[[list], torch.Tensor]:
    return lambda results: finish(results)[0]


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start allreduce(); the handle's result is a new tensor."""
    how = Reduction(choose_op(average, op, "allreduce"), name or "", prescale_factor, postscale_factor, process_set)
    staged = [stage(tensor, "allreduce")]
    return _start(staged, how, False, _first(give_all(staged)))


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start allreduce_(); the tensor belongs to the operation until it is done."""
    op = choose_op(average, op, "allreduce_")
    if is_used_itself(tensor, "allreduce_") and not tensor.requires_grad:  # the commonest: no detour for hundreds at once
        start = world.engine().allreduce_in_place
        number = 0 if process_set is global_process_set else number_of(process_set, "process_set")
        return Handle(start(tensor, op, prescale_factor, postscale_factor, name or "", number), changed)
    staged = [stage(tensor, "allreduce_")]
    how = Reduction(op, name or "", prescale_factor, postscale_factor, process_set)
    return _start(staged, how, True, _first(_written(staged)))


def grouped_allreduce_async(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start grouped_allreduce(); the handle's result is a list of new tensors."""
    how = Reduction(choose_op(average, op, "grouped_allreduce"), name or "", prescale_factor, postscale_factor, process_set)
    staged = stage_all(tensors, "grouped_allreduce")
    return _start(staged, how, False, give_all(staged))


def grouped_allreduce_async_(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start grouped_allreduce_(); the tensors belong to the operation until it is done."""
    how = Reduction(choose_op(average, op, "grouped_allreduce_"), name or "", prescale_factor, postscale_factor, process_set)
    staged = stage_all(tensors, "grouped_allreduce_")
    return _start(staged, how, True, _written(staged))


allreduce_ = waits_for(allreduce_async_, "allreduce_", "Reduce `tensor` over ranks in place and return it; see allreduce.")

grouped_allreduce_ = waits_for(
    grouped_allreduce_async_,
    "grouped_allreduce_",
    "Reduce a list of tensors over ranks in place and return it; see grouped_allreduce.",
)


class _AllReduce(torch.autograd.Function):
    """The gradient of a reduction is the same reduction of the gradient, for every operator, as in Horovod."""

    @staticmethod
    def forward(ctx, how: Reduction, *tensors: torch.Tensor):
        ctx.how = how
        staged = stage_all(tensors, "allreduce")
        return tuple(_start(staged, how, False, give_all(staged)).wait())

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        return None, *_AllReduce.apply(ctx.how.of_gradient, *gradients)


def reduce_differentiably(tensors: Sequence[torch.Tensor], how: Reduction) -> tuple[torch.Tensor, ...]:
    """New tensors, through which gradients flow."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _AllReduce.apply(how, *tensors)
    staged = [stage(tensor, "allreduce") for tensor in tensors]
    return tuple(_start(staged, how, False, give_all(staged)).wait())


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce `tensor` over ranks; every rank gets the same new tensor.

    tensor: any shape, the same on every rank; float32, float64, float16, bfloat16, int8..int64, uint8 or bool; on any device.
    average: Horovod's older way to say op: True for Average, False for Sum. Not together with op.
    name: agreed between ranks; operations without one are counted.
    op: Average (default), Sum, Min, Max, Product or Adasum. The gradient is the same reduction of the gradient.
    prescale_factor, postscale_factor: multiply before and after.
    Raises InvalidArgumentError at once, DuplicateNameError (the name is in flight), MismatchError (ranks differ in shape,
    dtype, op or factors; the job goes on), PeerLostError, TimeoutError.
    """
    how = Reduction(choose_op(average, op, "allreduce"), name or "", prescale_factor, postscale_factor, process_set)
    check_tensors([tensor], "allreduce")
    wire, context = compression.compress(tensor)
    (reduced,) = reduce_differentiably([wire], how)
    return compression.decompress(reduced, context)


def grouped_allreduce(
    tensors: Iterable[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """allreduce of a list of tensors: all or none, and together. Returns a list of new tensors in the same order."""
    how = Reduction(choose_op(average, op, "grouped_allreduce"), name or "", prescale_factor, postscale_factor, process_set)
    pairs = [compression.compress(tensor) for tensor in check_tensors(tensors, "grouped_allreduce")]
    reduced = reduce_differentiably([wire for wire, _ in pairs], how)
    return [compression.decompress(result, context) for result, (_, context) in zip(reduced, pairs, strict=True)]
