"""Gradient buckets: flat buffers that the library allocates, into which many gradients go as views and which travel as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from roundel.ops import Average, Max, Min, Product, ReduceOp, Sum
from roundel.torch.compression import Compressor
from roundel.world import communicator, rank, size

__all__ = ["Bucket", "plan_buckets"]

_ALIGN = 64  # bytes: gradients start on cache lines

# Flags travel with the gradients and meet the same operator; what comes out differs from _NO just when some rank said _YES.
_NO = {Sum: 0, Average: 0, Max: 0, Min: 0, Product: 1}
_YES = {Sum: 1, Average: 1, Max: 1, Min: -1, Product: 0}


def _allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that the ranks of this host share."""
    flat = torch.from_numpy(communicator().allocate(count * dtype.itemsize)).view(dtype)
    return flat.zero_()


class Bucket:
    """Some parameters' gradients side by side, and one flag for each that says whether any rank has a gradient for it.

    The last bucket of a step also has a flag for each rank, which says whether that rank gave up the step.

    Life of a step: put() or leave_out() for every parameter, launch() when none is pending, wait().
    """

    def __init__(
        self, name: str, params: Sequence[torch.nn.Parameter], compression: type[Compressor], op: ReduceOp, is_last: bool
    ) -> None:
        self.name, self.params = name, list(params)
        self._op, self._yes, self._no = op, _YES[op], _NO[op]
        dtype = self.params[0].dtype
        step = _ALIGN // dtype.itemsize
        offsets, end = [], 0
        for p in self.params:
            offsets.append(end)
            end += -(-p.numel() // step) * step
        flags = end + len(self.params)
        self._flat = _allocate(flags + (size() if is_last else 0), dtype)
        self.views = [self._flat[o : o + p.numel()].view_as(p) for o, p in zip(offsets, self.params, strict=True)]
        self._used, self._gave_up = self._flat[end:flags], self._flat[flags:]
        wire = compression.wire_dtype(dtype)
        self._wire = self._flat if wire == dtype else _allocate(self._flat.numel(), wire)
        self._handle = None
        self._reset()

    def _reset(self) -> None:
        self._pending = set(range(len(self.params)))
        self._version: int | None = None
        self._gave_up.fill_(self._no)

    @property
    def complete(self) -> bool:
        """Every parameter has said what its gradient is."""
        return not self._pending

    def is_pending(self, slot: int) -> bool:
        """This parameter has not said yet."""
        return slot in self._pending

    def put(self, slot: int) -> None:
        """The parameter's gradient is ready: it becomes a view of the bucket, copied there unless it is that already."""
        param, view = self.params[slot], self.views[slot]
        if param.grad.data_ptr() != view.data_ptr():
            view.copy_(param.grad.detach())
            param.grad = view
        self._used[slot] = self._yes
        self._pending.discard(slot)
        self.note_version()

    def leave_out(self, slot: int) -> None:
        """This rank has no gradient for the parameter: it counts as zero if another rank has one."""
        self.views[slot].zero_()
        self._used[slot] = self._no
        self._pending.discard(slot)

    def note_version(self) -> None:
        """All changes so far were autograd's or ours. Views share one counter of changes, so a later change to any shows."""
        self._version = self._flat._version

    def changed(self) -> bool:
        """Somebody else wrote to a gradient that was put here, or replaced it."""
        if self._version is None:
            return False
        put = (slot for slot in range(len(self.params)) if slot not in self._pending)
        replaced = any(
            self.params[slot].grad is None or self.params[slot].grad.data_ptr() != self.views[slot].data_ptr() for slot in put
        )
        return replaced or self._version != self._flat._version

    def give_up(self) -> None:
        """Tell all ranks, with the last bucket, that this step's gradients are not to be used."""
        self._gave_up[rank()] = self._yes

    def launch(self) -> None:
        """Start the all-reduce."""
        if self._wire is not self._flat:
            self._wire.copy_(self._flat)
        self._handle = communicator().allreduce_async(self._wire, self._op, self._wire, name=self.name)

    def wait(self) -> list[int]:
        """Finish the all-reduce; reduced gradients are in place, those that no rank has become None.

        Returns the ranks that gave up the step, by what the last bucket says.
        """
        handle, self._handle = self._handle, None
        handle.wait()
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)
        used, gave_up = self._used.ne(self._no).tolist(), self._gave_up.ne(self._no).tolist()
        for param, view, is_used in zip(self.params, self.views, used, strict=True):
            param.grad = view if is_used else None
        self._reset()
        return [r for r, flag in enumerate(gave_up) if flag]


def _title(names: Sequence[str]) -> str:
    return f"gradient of {names[0]}" if len(names) == 1 else f"gradients of {names[0]} to {names[-1]}"


def plan_buckets(
    params: Sequence[torch.nn.Parameter],
    names: Mapping[torch.nn.Parameter, str],
    bucket_bytes: int,
    compression: type[Compressor],
    op: ReduceOp,
) -> list[Bucket]:
    """Fill buckets with parameters in the order given, one dtype in each. The first is small, so that the wire is busy early.

    Every rank must give the same order. A parameter larger than a bucket gets one of its own.
    """
    groups: list[list[torch.nn.Parameter]] = []  # in the order in which they become complete
    filling: dict[torch.dtype, tuple[list[torch.nn.Parameter], int]] = {}  # by last parameter
    for p in params:
        group, filled = filling.pop(p.dtype, ([], 0))
        limit = bucket_bytes if groups else min(bucket_bytes, 1 << 20)
        nbytes = p.numel() * p.element_size()
        if group and nbytes >= limit:
            groups.append(group)
            group, filled = [], 0
        group.append(p)
        if filled + nbytes >= limit:
            groups.append(group)
        else:
            filling[p.dtype] = (group, filled + nbytes)
    groups += [group for group, _ in filling.values()]
    return [Bucket(_title([names[p] for p in group]), group, compression, op, is_last=group is groups[-1]) for group in groups]
