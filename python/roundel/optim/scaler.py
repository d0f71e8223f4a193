"""LossScaler: keeps float16 gradients within their range by scaling the loss, and skips steps whose gradients overflowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from roundel.errors import InvalidArgumentError, RoundelError
from roundel.optim import lists
from roundel.optim.base import FusedOptimizer

__all__ = ["LossScaler"]


class LossScaler:
    """Dynamic loss scaling, as torch.amp.GradScaler does it, that works with DistributedOptimizer as it is.

    scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()

    Gradients are checked inside step(), after they have been reduced: all ranks skip a step or none. With an optimizer of
    roundel.optim unscaling, check, clipping (max_norm) and update are one native call; others are unscaled before their step.
    init_scale, growth_factor, backoff_factor, growth_interval: as GradScaler's. min_scale: it never falls below.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 1.0,
        enabled: bool = True,
    ) -> None:
        if not growth_factor > 1:
            raise InvalidArgumentError(f"growth_factor: expected a number above 1, got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise InvalidArgumentError(f"backoff_factor: expected a number between 0 and 1, got {backoff_factor}")
        if not (isinstance(growth_interval, int) and growth_interval > 0):
            raise InvalidArgumentError(f"growth_interval: expected a whole number from 1 on, got {growth_interval}")
        if not 0 < min_scale <= init_scale < math.inf:
            raise InvalidArgumentError(f"init_scale: expected a finite number from min_scale {min_scale} on, got {init_scale}")
        self._scale, self._clean_steps = float(init_scale), 0
        self._growth_factor, self._backoff_factor = float(growth_factor), float(backoff_factor)
        self._growth_interval, self._min_scale, self._enabled = growth_interval, float(min_scale), bool(enabled)
        self._skipped: list[bool] = []  # by the steps since update()
        self._unscaled: list[torch.optim.Optimizer] = []

    def scale(self, outputs: Any) -> Any:
        """A loss, or a list, tuple or other iterable of them, multiplied by the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            return outputs * self._scale
        if isinstance(outputs, list | tuple):
            return type(outputs)(map(self.scale, outputs))
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise InvalidArgumentError(f"scale: expected a tensor or an iterable of tensors, got {type(outputs).__name__}")

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale now, for somebody who looks at them before step(). max_norm needs no such call.

        Under DistributedOptimizer call synchronize() before, and step() inside skip_synchronize().
        """
        if not self._enabled:
            return
        if any(seen is optimizer for seen in self._unscaled):
            raise RoundelError("unscale_() has already been called on this optimizer since the last update()")
        self._unscaled.append(optimizer)
        lists.scale_(_gradients(optimizer), 1.0 / self._scale)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """optimizer.step(*args, **kwargs) with unscaled gradients, unless one of them is not finite.

        Returns what step() returns; None where it was skipped. No closures: they would compute new gradients.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs or args:
            raise InvalidArgumentError("LossScaler.step: closures are not supported")
        scale = None if any(seen is optimizer for seen in self._unscaled) else self._scale
        if not isinstance(optimizer, FusedOptimizer):
            return self._step_other(optimizer, scale, kwargs)
        optimizer.grad_scale, optimizer._check_finite = scale, True
        try:
            result = optimizer.step(**kwargs)
        finally:
            del optimizer.grad_scale, optimizer._check_finite
        self._skipped.append(optimizer.last_step_skipped)
        return result

    def _step_other(self, optimizer: torch.optim.Optimizer, scale: float | None, kwargs: dict[str, Any]) -> Any:
        distributed = hasattr(optimizer, "skip_synchronize")
        if distributed and not optimizer._skip:
            optimizer.synchronize()
        with optimizer.skip_synchronize() if distributed and not optimizer._skip else nullcontext():
            grads = _gradients(optimizer)
            self._skipped.append(not math.isfinite(lists.norm(grads)))
            if self._skipped[-1]:
                return None
            if scale is not None:
                lists.scale_(grads, 1.0 / scale)
            return optimizer.step(**kwargs)

    def update(self, new_scale: float | None = None) -> None:
        """After all step()s of an iteration: a smaller scale if one was skipped, a larger one after many that were not."""
        if not self._enabled:
            return
        skipped, self._skipped, self._unscaled = any(self._skipped), [], []
        if new_scale is not None:
            self._scale = max(float(new_scale), self._min_scale)
        elif skipped:
            self._scale, self._clean_steps = max(self._scale * self._backoff_factor, self._min_scale), 0
        else:
            self._clean_steps += 1
            if self._clean_steps == self._growth_interval:
                grown = self._scale * self._growth_factor
                self._scale, self._clean_steps = grown if grown < _LARGEST else self._scale, 0

    def get_scale(self) -> float:
        """The scale; 1 where it is not enabled."""
        return self._scale if self._enabled else 1.0

    def is_enabled(self) -> bool:
        """What `enabled` said."""
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """GradScaler's fields, which can read it too; empty where it is not enabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._clean_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From state_dict() of this class or of GradScaler."""
        if not self._enabled:
            return
        if not state:
            raise InvalidArgumentError("LossScaler.load_state_dict: the state is empty: it was saved with enabled=False")
        self._scale, self._clean_steps = float(state["scale"]), int(state["_growth_tracker"])
        self._growth_factor, self._backoff_factor = float(state["growth_factor"]), float(state["backoff_factor"])
        self._growth_interval = int(state["growth_interval"])


_LARGEST = float(torch.finfo(torch.float32).max)  # the loss is float32 at most often; an infinite scale would never recover


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [g if g.layout == torch.strided else g.coalesce().values() for g in grads]
