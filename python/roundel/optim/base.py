"""The base of all fused optimizers: torch.optim.Optimizer's surface over native plans.

Gradients, parameters and state are torch tensors of the user's; a step is one native call for each param group, dtype and
device. Everything else (hooks, schedulers, param groups, state_dict) is torch's own.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from roundel.errors import InvalidArgumentError, RoundelError
from roundel.optim import lists
from roundel.optim import state as states
from roundel.optim.options import Options
from roundel.optim.plans import GroupPlans, Rule

__all__ = ["FusedOptimizer"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class FusedOptimizer(torch.optim.Optimizer):
    """What SGD, Adam and the others share. Not for use by itself.

    Works under torch.amp.GradScaler as torch's fused optimizers do: the scaler sets `grad_scale` and `found_inf`, and a step
    that found infinities changes nothing, not even `step`.
    """

    rule: ClassVar[Rule]
    _step_supports_amp_scaling = True  # asked by GradScaler
    _options = Options()
    max_norm: float | None = None
    _check_finite = False  # set by LossScaler for a step
    _last: tuple[float | None, bool, list] = (None, False, [])  # norm, whether skipped, plans that are to be asked

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        self._options, self.max_norm = options, options.max_norm
        self._plans: list[GroupPlans | None] = []
        self._planned_states = 0
        if defaults.get("differentiable"):
            raise InvalidArgumentError("differentiable=True: a fused step cannot be differentiated; torch.optim's can")
        if defaults.get("fused") and defaults.get("foreach"):
            raise InvalidArgumentError("`fused` and `foreach` cannot be `True` together.")  # torch's words
        super().__init__(params, {**defaults, "semantics": options.semantics, "ema_decay": options.ema_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises InvalidArgumentError for parameters that are not floating-point numbers."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in _DTYPES or p.layout != torch.strided:
                self.param_groups.pop()
                raise InvalidArgumentError(
                    f"{type(self).__name__}: expected float32, float64, float16 or bfloat16, got a parameter of {p.dtype}"
                )

    # ----- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns what the closure, called first, returns.

        Raises InvalidArgumentError, before anything is changed in a param group, for gradients that are sparse or of another
        shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        if self._options.master_weights and hasattr(self, "_names"):  # DistributedOptimizer's, of Adasum: it moved the
            self.reload_masters()  # parameters after the last step
        work = [(group, *batch) for i, group in enumerate(self.param_groups) for batch in self._batches(i, group)]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:
            self._check_synchronized()
        how = {
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "seed": self._options.seed,
            "threads": torch.get_num_threads(),
        }
        norm = skipped = None
        if self.max_norm is not None or self._check_finite:
            if len(work) == 1:
                how |= {"max_norm": self.max_norm, "check_finite": True}
            else:
                norm = lists.norm((g for _, _, grads in work for g in grads), grad_scale)
                skipped = not math.isfinite(norm)
                if self.max_norm is not None:
                    how["clip"] = min(1.0, self.max_norm / (norm + 1e-6))
        waiting = []  # plans on a GPU, which do not know yet
        if not skipped:
            for group, batch, grads in work:
                lists.mark_changed(batch.params)  # before the step, while they are still in the caches
                result = batch.step(grads, group, **how)
                norm, skipped = norm if result[0] is None else result[0], result[1]
                waiting += [batch.plan] if skipped is None else []
        self._last = norm, bool(skipped), waiting

    def _batches(self, i: int, group: dict[str, Any]) -> list:
        """The group's plans and gradients."""
        choices = self.rule.chosen(group, self._options.stochastic_rounding)
        if len(self.state) != self._planned_states:  # somebody removed or added entries
            self._plans.clear()
        self._plans += [None] * (i + 1 - len(self._plans))
        plans = self._plans[i]
        if plans is None or not plans.still_right(group, choices, self.state):
            plans = self._plans[i] = GroupPlans(self.rule, group, choices, self.state, self._options)
        batches = plans.batches()
        self._planned_states = len(self.state)
        return batches

    def _check_synchronized(self) -> None:
        """GradScaler looks for infinities before step(). Under DistributedOptimizer those would be this rank's own only."""
        if getattr(self, "_reducer", None) is not None and not self._skip:
            raise RoundelError(
                "GradScaler looked at gradients that were not yet reduced, so ranks could differ in skipping the step: call "
                "synchronize() before, and scaler.step(optimizer) inside skip_synchronize(); or use roundel.optim.LossScaler"
            )

    @property
    def last_grad_norm(self) -> float | None:
        """The 2-norm of all gradients of the last step, unscaled, before clipping; None where it was not taken.

        It is with max_norm, and under LossScaler. Reading it waits for the device.
        """
        return self._outcome()[0]

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step changed nothing, because of infinities. Reading it waits for the device."""
        return self._outcome()[1]

    def _outcome(self) -> tuple[float | None, bool]:
        norm, skipped, waiting = self._last
        for found, skipped_there in (plan.result() for plan in waiting):
            norm, skipped = norm if found is None else found, skipped or bool(skipped_there)
        self._last = norm, skipped, []
        return norm, skipped

    # ----- state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.__dict__.pop("_taken", self.state)
        self._plans, self._planned_states = [], 0
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and readable by the torch.optim optimizer of the same name.

        What that does not have (master, ema) it carries along. Tensors are the optimizer's own, not copies.
        """
        saved = super().state_dict()
        if not self.rule.keeps_step and not self._options.stochastic_rounding:
            saved["state"] = {k: _without_step(v) for k, v in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from ours or torch.optim's. Tensors are copied; moments keep the dtype that they were saved in.

        Raises InvalidArgumentError when a tensor has another shape than its parameter, ValueError as torch's.
        """
        # torch casts state to the parameter's dtype, which for float16 loses float32 moments: it gets none to cast.
        handle = self.register_load_state_dict_pre_hook(_take_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_taken", None)

    def release_frozen(self) -> int:
        """Drop the state of parameters that no longer require gradients. Returns how many bytes that freed.

        Without this it stays, as torch's does, for when they are unfrozen.
        """
        freed = 0
        for p in [p for p in self.state if isinstance(p, torch.Tensor) and not p.requires_grad]:
            freed += sum(t.numel() * t.element_size() for t in self.state.pop(p).values() if isinstance(t, torch.Tensor))
        if freed:
            self._plans.clear()  # they hold what they write to
        return freed

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the float32 masters from the parameters again, after somebody else than step() changed those."""
        for p, state in self.state.items():
            if "master" in state:
                state["master"].copy_(p)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside this context parameters hold their averages (ema_decay), for example to evaluate; no step() there."""
        held = [(p, p.detach().clone()) for p, state in self.state.items() if "ema" in state]
        with torch.no_grad():
            for p, _ in held:
                p.copy_(self.state[p]["ema"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weights in held:
                    p.copy_(weights)


@torch.no_grad()
def _take_state(optimizer: FusedOptimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Make the optimizer's tensors from saved ones and leave none to torch. Wrong lengths of groups are torch's to report."""
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    param_of = dict(zip(numbers, params, strict=False))
    taken: defaultdict[Any, Any] = defaultdict(dict)
    for key, state in saved["state"].items():
        p = param_of.get(key)
        taken[key if p is None else p] = (
            state if p is None else {name: states.loaded(p, name, v, optimizer._options) for name, v in state.items()}
        )
    optimizer._taken = taken
    return {**saved, "state": {}}


def _without_step(state: dict[str, Any]) -> dict[str, Any]:
    """A momentum that has not had its first step is not there yet, in torch's words."""
    first = "step" in state and not state["step"]
    return {k: v for k, v in state.items() if k != "step" and not (first and k == "momentum_buffer")}
