"""Collectives on torch tensors with Horovod's names and defaults.

Each comes as `op` (new tensor, differentiable), `op_` (in place), `op_async` and `op_async_` (a handle for poll() and
synchronize()).
Tensors may be on any device and have any strides: those that are not contiguous CPU tensors go through a contiguous CPU copy.
All ranks call the same operations in the same order. Raises MismatchError, PeerLostError, TimeoutError from synchronize().
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch.autograd.graph import increment_version

from roundel import _core
from roundel.errors import InvalidArgumentError, MismatchError
from roundel.ops import Average, ReduceOp, Sum
from roundel.torch.compression import Compression, Compressor
from roundel.world import communicator, rank, size

__all__ = [
    "Handle",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "poll",
    "synchronize",
]


class Handle:
    """An operation under way; `finish` turns the core's result into the caller's tensor."""

    def __init__(self, native: _core.Handle, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._native, self._finish = native, finish
        self._result: torch.Tensor | None = None

    def done(self) -> bool:
        """True when wait() would not block."""
        return self._native.done()

    def wait(self) -> torch.Tensor:
        """The result; may be called again."""
        if self._result is None:
            self._result = self._finish(self._native.wait())
        return self._result


def poll(handle: Handle) -> bool:
    """True when synchronize(handle) would not block."""
    return handle.done()


def synchronize(handle: Handle) -> torch.Tensor:
    """Wait for an asynchronous operation and return its result."""
    return handle.wait()


def _require_tensor(tensor: object, what: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InvalidArgumentError(f"{what}: expected a dense torch.Tensor, got {type(tensor).__name__}")
    return tensor.detach()


def _to_core(tensor: torch.Tensor) -> torch.Tensor:
    """What the core can read: contiguous, on the CPU. The tensor itself where it is that."""
    return tensor.to("cpu").contiguous().resolve_neg()


def _write_back(target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """For in-place operations: the result lands in `target`, unless it was made there."""
    detached = target.detach()

    def finish(result: torch.Tensor) -> torch.Tensor:
        if result.data_ptr() != detached.data_ptr():
            detached.copy_(result)
        else:
            increment_version(detached)  # as torch's own in-place operations do: autograd refuses to use what it saved of it
        return target

    return finish


def _choose_op(average: bool | None, op: ReduceOp | None) -> ReduceOp:
    if average is not None and op is not None:
        raise ValueError("give either `average` or `op`, not both")
    if op is not None:
        return op
    return Sum if average is False else Average


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start allreduce(); the handle's result is a new tensor."""
    source = _to_core(_require_tensor(tensor, "allreduce"))
    native = communicator().allreduce_async(
        source, _choose_op(average, op), name=name or "", prescale=prescale_factor, postscale=postscale_factor
    )
    return Handle(native, lambda result: result.to(tensor.device))


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start allreduce_(); the tensor belongs to the operation until it is done."""
    buffer = _to_core(_require_tensor(tensor, "allreduce_"))
    native = communicator().allreduce_async(
        buffer, _choose_op(average, op), buffer, name=name or "", prescale=prescale_factor, postscale=postscale_factor
    )
    return Handle(native, _write_back(tensor))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, name, op, prescale, postscale):
        ctx.arguments = (name and name + ".grad", op, prescale, postscale)
        return allreduce_async(tensor, None, name, op, prescale, postscale).wait()

    @staticmethod
    def backward(ctx, gradient):
        return _AllReduce.apply(gradient, *ctx.arguments), None, None, None, None


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce `tensor` over ranks; every rank gets the same new tensor.

    tensor: any shape, the same on every rank; float32, float64, float16, bfloat16, int8..int64, uint8 or bool.
    op: Average (default), Sum, Min, Max, Product. The gradient is the same reduction of the gradient.
    """
    wire, context = compression.compress(tensor)
    reduced = _AllReduce.apply(wire, name, _choose_op(average, op), prescale_factor, postscale_factor)
    return compression.decompress(reduced, context)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce `tensor` over ranks in place; see allreduce."""
    return allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor).wait()


def _gather_rows(tensor: torch.Tensor) -> list[int]:
    """Every rank's number of rows, once it is known that rows are of one shape and dtype."""
    shape = tuple(tensor.shape) or (1,)
    row = f"{str(tensor.dtype).removeprefix('torch.')} rows of shape {shape[1:]}"
    mine = torch.tensor([shape[0], zlib.crc32(row.encode())], dtype=torch.int64)
    rows, kinds = communicator().allgather(mine, name="allgather: rows").view(-1, 2).T.tolist()
    if len(set(kinds)) > 1:
        others = [r for r, kind in enumerate(kinds) if kind != mine[1]]
        raise MismatchError(f"rank {rank()}: allgather of {row}, but rank {', '.join(map(str, others))} has others")
    return rows


def allgather_async(tensor: torch.Tensor, name: str | None = None) -> Handle:
    """Start allgather(). The ranks' numbers of rows are exchanged before this returns."""
    source = _to_core(_require_tensor(tensor, "allgather"))
    native = communicator().allgather_async(source, _gather_rows(source), name=name or "")
    return Handle(native, lambda result: result.to(tensor.device))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, name):
        ctx.name = name and name + ".grad"
        source = _to_core(_require_tensor(tensor, "allgather"))
        rows = _gather_rows(source)
        ctx.begin, ctx.shape = sum(rows[: rank()]), tensor.shape
        return communicator().allgather(source, rows, name=name or "").to(tensor.device)

    @staticmethod
    def backward(ctx, gradient):
        reduced = _AllReduce.apply(gradient, ctx.name, Average, 1.0, 1.0)
        rows = ctx.shape[0] if ctx.shape else 1
        return reduced.narrow(0, ctx.begin, rows).reshape(ctx.shape), None


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """Concatenate every rank's tensor along dimension 0, in rank order.

    tensor: shape (n_r, ...); ranks may differ in n_r only. Scalars count as shape (1,). Returns shape (sum of n_r, ...).
    The gradient is this rank's rows of the averaged gradient, as in Horovod.
    """
    return _AllGather.apply(tensor, name)


def broadcast_async(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """Start broadcast(); the handle's result is a new tensor."""
    buffer = _to_core(_require_tensor(tensor, "broadcast"))
    if buffer.data_ptr() == tensor.data_ptr():
        buffer = buffer.clone()
    native = communicator().broadcast_async(buffer, root_rank, name=name or "")
    return Handle(native, lambda result: result.to(tensor.device))


def broadcast_async_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """Start broadcast_(); the tensor belongs to the operation until it is done."""
    buffer = _to_core(_require_tensor(tensor, "broadcast_"))
    return Handle(communicator().broadcast_async(buffer, root_rank, name=name or ""), _write_back(tensor))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, root_rank, name):
        ctx.root_rank, ctx.name = root_rank, name and name + ".grad"
        return broadcast_async(tensor, root_rank, name).wait()

    @staticmethod
    def backward(ctx, gradient):
        reduced = _AllReduce.apply(gradient, ctx.name, Average, 1.0, 1.0)
        if rank() != ctx.root_rank:  # zeros that remember where they come from: the ranks' second derivatives meet as well
            reduced = reduced.masked_fill(torch.ones_like(reduced, dtype=torch.bool), 0)
        return reduced, None, None


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Root's tensor on every rank, as a new tensor. Shape and dtype are the same on every rank.

    The gradient is averaged to root and zero elsewhere, as in Horovod.
    """
    return _Broadcast.apply(tensor, root_rank, name)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Overwrite `tensor` with root's, in place."""
    return broadcast_async_(tensor, root_rank, name).wait()


def barrier() -> None:
    """Wait for every rank."""
    if size() > 1:
        communicator().barrier()
