"""Lists of gradients, of any dtypes and devices: their norm, and scaling them in place. One pass over each device's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.autograd.graph import increment_version

from roundel import _core

__all__ = ["mark_changed", "norm", "scale_", "stream_of"]


def _takes_lists() -> bool:
    try:
        increment_version([])
    except Exception:
        return False
    return True


_TAKES_LISTS = _takes_lists()  # newer torch does


def mark_changed(tensors: list[torch.Tensor]) -> None:
    """Tell autograd, and whoever counts changes, that these were written to."""
    if _TAKES_LISTS:
        increment_version(tensors)
    else:
        for t in tensors:
            increment_version(t)


def stream_of(device: torch.device) -> int:
    """The stream on which torch works now, as the core takes it; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _by_device(tensors: Iterable[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    found: dict[torch.device, list[torch.Tensor]] = {}
    for t in tensors:
        found.setdefault(t.device, []).append(t)
    return found


def norm(tensors: Iterable[torch.Tensor], grad_scale: float | torch.Tensor | None = None) -> float:
    """The 2-norm of all elements together, in float64, divided by grad_scale. Waits for devices."""
    threads = torch.get_num_threads()
    scale = 1.0 if grad_scale is None else float(grad_scale)
    parts = [_core.grad_norm(some, None, threads, stream_of(device)) for device, some in _by_device(tensors).items()]
    if not all(map(math.isfinite, parts)):
        return sum(parts)
    return math.hypot(*parts) / scale


def scale_(tensors: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply all elements by factor; autograd sees that they have changed."""
    threads = torch.get_num_threads()
    for device, some in _by_device(tensors).items():
        _core.scale_tensors(some, factor, threads, stream_of(device))
        mark_changed(some)
