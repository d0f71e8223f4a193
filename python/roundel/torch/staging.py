"""Between the caller's tensors and the contiguous CPU tensors that the core reads and writes.

A tensor that is contiguous and on the CPU is used itself. Any other goes through a copy: in page-locked memory for CUDA
tensors, so that the device copies at full speed and the way back is ordered on the caller's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, strided
from torch.autograd.graph import increment_version

from roundel.errors import InvalidArgumentError
from roundel.ops import choose_op
from roundel.process_sets import number_of

__all__ = [
    "Staged",
    "changed",
    "check_tensors",
    "choose_op",
    "device_of",
    "give_all",
    "is_used_itself",
    "number_of",
    "stage",
    "stage_all",
]


def _check_tensor(tensor: object, what: str) -> torch.Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout is not strided:
        kind = f"one of layout {tensor.layout}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidArgumentError(f"{what}: expected a dense torch.Tensor, got {kind}")
    return tensor


def check_tensors(tensors: Iterable[torch.Tensor], what: str) -> list[torch.Tensor]:
    """The tensors as a list. Raises InvalidArgumentError unless they are dense, at least one, and all on one device."""
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Iterable):
        raise InvalidArgumentError(f"{what}: expected a list of tensors, got {type(tensors).__name__}")
    tensors = [_check_tensor(tensor, what) for tensor in tensors]
    if not tensors:
        raise InvalidArgumentError(f"{what}: expected at least one tensor, got an empty list")
    first = tensors[0].device
    if any(tensor.device != first for tensor in tensors):
        devices = {str(tensor.device) for tensor in tensors}
        raise InvalidArgumentError(f"{what}: expected tensors of one device, got {', '.join(sorted(devices))}")
    return tensors


def is_used_itself(tensor: torch.Tensor, what: str) -> bool:
    """Whether the core reads and writes this tensor's own memory. Raises InvalidArgumentError for what is no dense tensor."""
    _check_tensor(tensor, what)
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, after the core has written to it: as with torch's own in-place operations, autograd refuses to use what it
    saved of it."""
    increment_version(tensor)
    return tensor


class Staged:
    """A caller's tensor and the buffer that stands for it in the core."""

    __slots__ = ("buffer", "is_copy", "tensor")

    def __init__(self, tensor: torch.Tensor, what: str) -> None:
        self.tensor = tensor
        self.is_copy = not is_used_itself(tensor, what)
        detached = tensor.detach() if tensor.requires_grad else tensor
        if not self.is_copy:
            self.buffer = detached
        elif tensor.is_cuda:
            self.buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.buffer.copy_(detached, non_blocking=True)
            torch.cuda.current_stream(tensor.device).synchronize()
        else:
            self.buffer = detached.to("cpu").contiguous().resolve_neg()

    def give(self, result: torch.Tensor) -> torch.Tensor:
        """A result of the core as a new tensor where the caller's is."""
        if self.tensor.is_cpu:
            return result
        return result.to(self.tensor.device, non_blocking=result.is_pinned() if self.tensor.is_cuda else False)

    def write_back(self) -> torch.Tensor:
        """The caller's tensor, changed in place: what is in the buffer lands there, unless it was made there."""
        if self.is_copy:
            self.tensor.detach().copy_(self.buffer, non_blocking=self.tensor.is_cuda)
        else:
            changed(self.buffer)
        return self.tensor


def stage(tensor: torch.Tensor, what: str) -> Staged:
    """For an operation on one tensor."""
    return Staged(tensor, what)


def stage_all(tensors: Iterable[torch.Tensor], what: str) -> list[Staged]:
    """For a grouped operation; see check_tensors."""
    return [Staged(tensor, what) for tensor in check_tensors(tensors, what)]


def give_all(staged: list[Staged]) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """What makes the core's results of a grouped operation new tensors of the caller's."""
    return lambda results: [s.give(result) for s, result in zip(staged, results, strict=True)]


def device_of(staged: Staged) -> int:
    """What ranks compare: -1 for the CPU, else the device's index."""
    return -1 if staged.tensor.is_cpu else staged.tensor.device.index or 0
