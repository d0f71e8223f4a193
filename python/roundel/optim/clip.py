"""clip_grad_norm_: torch.nn.utils's, in two passes over any number of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from roundel.optim import lists

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that their norm, taken over all of them together, is at most max_norm.

    parameters: their `grad`s are clipped, those that have one. Any mixture of floating dtypes. On a GPU this waits for the
    norm.
    norm_type: other norms than 2 are torch's own function's work. foreach: without effect.
    Returns the norm before clipping, as torch.nn.utils.clip_grad_norm_: a tensor without dimensions, of the first gradient's
    dtype. With a norm that is not finite gradients become NaN or 0, as there. Raises RuntimeError for such a norm where
    error_if_nonfinite.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    if norm_type != 2 or not grads or any(g.layout != torch.strided for g in grads):
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = lists.norm(grads)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
            "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # NaN multiplies too, as torch's does
        lists.scale_(grads, factor)
    return torch.tensor(norm, dtype=grads[0].dtype, device=grads[0].device)
