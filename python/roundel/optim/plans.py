"""From a param group and its gradients to native plans, which step any number of tensors in one call.

A plan is made when a set of gradients first appears and kept: a step costs Python one look at each parameter's gradient. What
would make a kept plan wrong is noticed: another parameter, group, state or option, or other memory of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch

from roundel import _core
from roundel.errors import InvalidArgumentError
from roundel.optim import lists
from roundel.optim import state as states
from roundel.optim.options import Options

__all__ = ["Batch", "GroupPlans", "Rule"]

MOST_PATTERNS = 16  # sets of gradients whose plans are kept; experts that take turns could have any number


@dataclass(frozen=True)
class Rule:
    """What the core calls a rule, and what of it depends on a param group.

    choices: entries of the group that choose another loop when they are not zero; the core may call them otherwise.
    keeps_step: whether torch.optim's state has a `step`. A count that is needed beyond that is not saved.
    """

    name: str
    choices: tuple[tuple[str, str], ...] = ()
    keeps_step: bool = True

    def chosen(self, group: dict[str, Any], stochastic: bool) -> dict[str, Any]:
        """The plan's options for this group."""
        choices: dict[str, Any] = {option: bool(group[entry]) for option, entry in self.choices}
        if "nesterov" in choices:
            choices["nesterov"] &= choices["momentum"]
        choices["maximize"] = bool(group["maximize"])
        choices["semantics"] = group["semantics"]
        choices["rounding"] = "stochastic" if stochastic else "nearest"
        choices["average"] = group["ema_decay"] is not None
        return choices


class Batch:
    """The parameters of one group that share dtypes and device, and their plan."""

    def __init__(
        self, rule: Rule, choices: dict[str, Any], where: list[int], params: list[torch.Tensor], streams: dict[str, list]
    ) -> None:
        self.where, self.params, self._rule = where, params, rule
        self._names = _core.optimizer_hyper(rule.name, choices)
        self._copies_grads = False  # some gradient has another layout than its parameter
        moments = [streams[name] for name in _core.optimizer_states(rule.name, choices)]
        rest = {argument: streams.get(name) for argument, name in _ARGUMENTS.items()}
        self._device = params[0].device
        self.plan = _core.OptimizerPlan(rule.name, choices, params, moments, **rest)

    def hyper(self, group: dict[str, Any]) -> list[float]:
        """The group's numbers in the plan's order, read anew at every step: schedulers change them."""
        betas = group.get("betas", ())
        return [float(betas[int(name[-1]) - 1] if name in ("beta1", "beta2") else group[name]) for name in self._names]

    def step(self, grads: list[torch.Tensor], group: dict[str, Any], **how: Any) -> tuple[float | None, bool | None]:
        """The plan's step. What the plan refuses is put right or explained here; it has changed nothing then."""
        hyper = self.hyper(group)
        how["stream"] = lists.stream_of(self._device)
        if self._copies_grads:
            grads = self._like_params(grads)
        try:
            return self.plan.step(grads, hyper, **how)
        except (RuntimeError, BufferError, TypeError):
            alike = self._like_params(grads)
            if all(map(is_, alike, grads)):
                raise
        self._copies_grads = True
        return self.plan.step(alike, hyper, **how)

    def _like_params(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of their parameters' layout: themselves or copies."""
        alike = []
        for p, grad in zip(self.params, grads, strict=True):
            check_dense(grad, self._rule)
            if grad.shape != p.shape:
                shapes = f"expected a gradient of shape {tuple(p.shape)} as its parameter, got {tuple(grad.shape)}"
                raise InvalidArgumentError(f"{self._rule.name}: {shapes}")
            same = grad.stride() == p.stride()
            alike.append(grad if same else torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad))
        return alike


_ARGUMENTS = {"masters": "master", "averages": "ema", "steps": "step"}


def check_dense(grad: torch.Tensor, rule: Rule) -> None:
    """Raises InvalidArgumentError for a sparse gradient."""
    if grad.layout != torch.strided:
        raise InvalidArgumentError(
            f"{rule.name}: expected dense gradients, got a sparse one of shape {tuple(grad.shape)}: torch.optim's SGD and "
            "SparseAdam take those; a layer made with sparse=False does not give them"
        )


class GroupPlans:
    """The plans of one param group, by which of its parameters have gradients."""

    def __init__(self, rule: Rule, group: dict[str, Any], choices: dict[str, Any], state: dict, options: Options) -> None:
        self._rule, self._group, self._choices, self._state, self._options = rule, group, choices, state, options
        self._params = list(group["params"])
        self._by_pattern: dict[bytes, list[Batch]] = {}
        self._whole: Batch | None = None  # the plan of all parameters, where they are alike

    def still_right(self, group: dict[str, Any], choices: dict[str, Any], state: dict) -> bool:
        """Whether they were made for this group with these options and state."""
        return group is self._group and state is self._state and choices == self._choices

    def batches(self) -> list[tuple[Batch, list[torch.Tensor]]]:
        """What there is to step now: each plan with its gradients. Parameters without one are left out."""
        params = self._group["params"]
        if self._whole is not None:
            grads = self._whole.plan.gradients(params)
            if grads is not None:
                return [(self._whole, grads)]
        grads = [p.grad for p in params]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._params, self._by_pattern = list(params), {}
        pattern = bytes(map(is_not, grads, repeat(None)))
        work = [(batch, batch.plan.gradients(batch.params)) for batch in self._by_pattern.get(pattern, ())]
        if not work or any(its is None for _, its in work):
            self._by_pattern.pop(pattern, None)
            if len(self._by_pattern) == MOST_PATTERNS:
                del self._by_pattern[next(iter(self._by_pattern))]
            batches = self._by_pattern[pattern] = self._plan(grads)
            work = [(batch, [grads[i] for i in batch.where]) for batch in batches]
            if len(work) == 1 and len(work[0][1]) == len(params):
                self._whole = work[0][0]
        return work

    @torch.no_grad()
    def _plan(self, grads: list[torch.Tensor | None]) -> list[Batch]:
        """One batch for each mixture of dtypes and each device. Makes what is missing of the state."""
        rule, choices, options = self._rule, self._choices, self._options
        moments = tuple(_core.optimizer_states(rule.name, choices))
        counts = rule.keeps_step or _core.optimizer_needs_steps(rule.name, choices)
        alike: dict[tuple, list[int]] = {}
        for i, grad in enumerate(grads):
            if grad is not None:
                check_dense(grad, rule)
                p = self._params[i]
                state = self._state.get(p, {})
                states.complete(state, p, moments, counts, self._group, options)
                if state:
                    self._state[p] = state
                kinds = tuple(state[name].dtype for name in moments)
                alike.setdefault((p.dtype, p.device, grad.dtype, kinds), []).append(i)
        batches = []
        for where in alike.values():
            params = [self._params[i] for i in where]
            names = list(moments)
            names += ["step"] * counts + ["master"] * states.needs_master(params[0], options) + ["ema"] * choices["average"]
            streams = {name: [self._state[p][name] for p in params] for name in names}
            batches.append(Batch(rule, choices, where, params, streams))
        return batches
