"""Gradient buckets: flat buffers that the library allocates, into which many gradients go as views and which travel as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundel.ops import ReduceOp
from roundel.torch.compression import Compressor
from roundel.world import communicator

__all__ = ["Bucket", "plan_buckets"]

_ALIGN = 64  # bytes: gradients start on cache lines


def _allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that the ranks of this host share."""
    flat = torch.from_numpy(communicator().allocate(count * dtype.itemsize)).view(dtype)
    return flat.zero_()


class Bucket:
    """Some parameters' gradients side by side, and one flag for each that says whether any rank has a gradient for it.

    Life of a step: put() or leave_out() for every parameter, launch() when none is pending, wait().
    """

    def __init__(self, index: int, params: Sequence[torch.nn.Parameter], compression: type[Compressor]) -> None:
        self.params = list(params)
        self._name = f"gradient bucket {index}"
        dtype = self.params[0].dtype
        step = _ALIGN // dtype.itemsize
        offsets, end = [], 0
        for p in self.params:
            offsets.append(end)
            end += -(-p.numel() // step) * step
        self._flat = _allocate(end + len(self.params), dtype)
        self.views = [self._flat[o : o + p.numel()].view_as(p) for o, p in zip(offsets, self.params, strict=True)]
        self._flags = self._flat[end:]
        wire = compression.wire_dtype(dtype)
        self._wire = self._flat if wire == dtype else _allocate(self._flat.numel(), wire)
        self._handle = None
        self._pending = set(range(len(self.params)))

    @property
    def complete(self) -> bool:
        """Every parameter has said what its gradient is."""
        return not self._pending

    def is_pending(self, slot: int) -> bool:
        """This parameter has not said yet."""
        return slot in self._pending

    @property
    def launched(self) -> bool:
        """The bucket belongs to a collective under way."""
        return self._handle is not None

    def put(self, slot: int) -> None:
        """The parameter's gradient is ready: it becomes a view of the bucket, copied there unless it is that already."""
        param, view = self.params[slot], self.views[slot]
        if param.grad.data_ptr() != view.data_ptr():
            view.copy_(param.grad)
            param.grad = view
        self._flags[slot] = 1
        self._pending.discard(slot)

    def leave_out(self, slot: int) -> None:
        """This rank has no gradient for the parameter: it counts as zero if another rank has one."""
        self.views[slot].zero_()
        self._flags[slot] = 0
        self._pending.discard(slot)

    def launch(self, op: ReduceOp) -> None:
        """Start the all-reduce."""
        if self._wire is not self._flat:
            self._wire.copy_(self._flat)
        self._handle = communicator().allreduce_async(self._wire, op, self._wire, name=self._name)

    def wait(self) -> None:
        """Finish the all-reduce. Gradients that no rank has become None."""
        handle, self._handle = self._handle, None
        handle.wait()
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)
        used = self._flags.ne(0).tolist()
        for param, view, is_used in zip(self.params, self.views, used, strict=True):
            param.grad = view if is_used else None
        self._pending = set(range(len(self.params)))


def plan_buckets(params: Sequence[torch.nn.Parameter], bucket_bytes: int, compression: type[Compressor]) -> list[Bucket]:
    """Fill buckets with parameters in the order given, one dtype in each. The first is small, so that the wire is busy early.

    Every rank must give the same order. A parameter larger than a bucket gets one of its own.
    """
    groups: list[list[torch.nn.Parameter]] = []
    filling: dict[torch.dtype, tuple[list[torch.nn.Parameter], int]] = {}
    for p in params:
        group, filled = filling.get(p.dtype, ([], 0))
        if not group:
            groups.append(group)
        group.append(p)
        filled += p.numel() * p.element_size()
        limit = bucket_bytes if len(groups) > 1 else min(bucket_bytes, 1 << 20)
        filling[p.dtype] = ([], 0) if filled >= limit else (group, filled)
    return [Bucket(i, group, compression) for i, group in enumerate(groups)]
