"""DistributedOptimizer: an optimizer whose gradients are reduced over ranks while backward is still running."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from roundel import world
from roundel.errors import InvalidArgumentError, RoundelError
from roundel.ops import Adasum, Average, ReduceOp
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.adasum import combine_deltas, starting_points
from roundel.torch.allreduce import allreduce
from roundel.torch.compression import Compression, Compressor
from roundel.torch.reducer import Reducer, Settings
from roundel.torch.staging import choose_op, number_of
from roundel.world import rank

__all__ = ["DistributedOptimizer"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _reduce_loss(loss: Any, settings: Settings) -> Any:
    how = {"op": settings.op, "name": "closure's loss", "process_set": settings.process_set}
    if isinstance(loss, torch.Tensor):
        return allreduce(loss.detach(), **how)
    if isinstance(loss, (int, float)):
        return allreduce(torch.tensor(loss, dtype=torch.float64), **how).item()
    return loss


class _Wrapped:
    """What both kinds put in front of the class of the optimizer that DistributedOptimizer is given."""

    _base: type[torch.optim.Optimizer]

    def __reduce_ex__(self, protocol):
        """Copies and pickles are plain optimizers: hooks and shared memory belong to this process and these parameters."""
        return object.__new__, (self._base,), self.__getstate__()


class _Distributed(_Wrapped):
    """An optimizer whose gradients are reduced before its step."""

    _reducer: Reducer | None
    _skip: bool

    def synchronize(self) -> None:
        """Wait until this step's gradients are reduced, for example to clip them before `with skip_synchronize(): step()`."""
        if self._reducer is not None:
            self._reducer.synchronize([p for group in self.param_groups for p in group["params"]])

    @contextlib.contextmanager
    def skip_synchronize(self):
        """step() inside this context takes the gradients as they are; call synchronize() first."""
        self._skip = True
        try:
            yield
        finally:
            self._skip = False

    def _synchronize_unless_skipped(self) -> None:
        if not self._skip:
            self.synchronize()
        elif self._reducer is not None and self._reducer.handed_over:
            raise RoundelError(
                f"rank {rank()}: step() inside skip_synchronize() while gradients are being reduced: call synchronize() first"
            )

    def step(self, closure=None):
        """Reduce the gradients over ranks, then update the parameters.

        A closure's gradients are reduced whenever it is called, and so is the number or tensor that it returns, so that an
        optimizer that looks at the loss (LBFGS) does the same on every rank.
        """
        self._opt_called = True  # torch's schedulers ask for this
        if closure is None:
            if not self._skip and self._reducer is not None and self._reducer.synchronized:
                warnings.warn(
                    "step() after synchronize() reduces the gradients again; use `with optimizer.skip_synchronize()`",
                    stacklevel=2,
                )
            self._synchronize_unless_skipped()
            result = super().step()
        else:

            def reduced_closure():
                loss = closure()
                self._synchronize_unless_skipped()
                return loss if self._skip or self._reducer is None else _reduce_loss(loss, self._reducer.settings)

            result = super().step(reduced_closure)
        if self._reducer is not None:
            self._reducer.synchronized = False
        return result

    def zero_grad(self, *args, **kwargs) -> None:
        """As torch's. Raises RoundelError between backward() and step(), when gradients are on their way.

        After an exception in backward() it gives up the step, as all ranks have to: those that call step() instead get a
        RoundelError that says so, and none uses the gradients.
        """
        if self._reducer is not None:
            self._reducer.abandon()
        super().zero_grad(*args, **kwargs)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """How many backward passes make a step, from the next step on; the same on every rank."""
        _check_passes(passes)
        if self._reducer is not None:
            self._reducer.set_passes(passes)


class _DistributedAdasum(_Wrapped):
    """An optimizer that steps with its own gradients; what that changed is combined over ranks by Adasum."""

    _settings: Settings
    _names: dict[torch.nn.Parameter, str]

    def synchronize(self) -> None:
        """Nothing: there are no gradients on their way."""

    def skip_synchronize(self):
        """Not for Adasum, as in Horovod: raises AssertionError."""
        raise AssertionError("skip_synchronize() is not supported with Adasum: it reduces what step() changed, not gradients")

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Gradients add up until step() in any case."""
        _check_passes(passes)

    def step(self, closure=None):
        """Take a step with this rank's gradients, then move the parameters by the Adasum of all ranks' changes.

        Parameters without a gradient on this rank count as unchanged here. Returns what a closure returns, of this rank.
        """
        self._opt_called = True  # torch's schedulers ask for this
        before = starting_points(self._names)
        result = super().step() if closure is None else super().step(closure)
        combine_deltas(before, self._names, self._settings.compression, self._settings.process_set)
        return result


for _kind in (_Distributed, _DistributedAdasum):
    # torch must neither call step hooks around this step too (the base class's step does), nor replace it on the instance.
    _kind.step.hooked = True
    _kind.step._wrapped_by_lr_sched = True


def _check_named(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]] | None
) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of each of the optimizer's parameters, once."""
    params = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    if named is None:
        return [(f"parameter {i}", p) for i, p in enumerate(params)]
    named = list(named)
    if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in named):
        raise InvalidArgumentError("named_parameters: expected (name, parameter) pairs such as model.named_parameters()")
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise InvalidArgumentError(f"named_parameters: expected each name once, got {', '.join(duplicates)} more often")
    name_of = {p: name for name, p in reversed(named)}  # tied weights may come under several names: the first counts
    missing = sum(p not in name_of for p in params)
    if missing:
        raise InvalidArgumentError(f"named_parameters: {missing} of the optimizer's {len(params)} parameters have no name")
    return [(name_of[p], p) for p in params]


def _check_passes(passes: int) -> None:
    if not isinstance(passes, int) or passes < 1:
        raise InvalidArgumentError(f"backward_passes_per_step: expected at least 1, got {passes}")


def _check_supported(named: list[tuple[str, torch.nn.Parameter]]) -> None:
    for name, p in named:
        if p.requires_grad and p.dtype not in _DTYPES:
            raise InvalidArgumentError(
                f"DistributedOptimizer: expected float32, float64, float16 or bfloat16, got '{name}' of {p.dtype}"
            )


def _check_groups(num_groups: int, groups: Any) -> int | list[list[torch.nn.Parameter]] | None:
    if num_groups != 0:
        warnings.warn("num_groups has become groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if groups is None:
        return None
    if isinstance(groups, int) and not isinstance(groups, bool) and groups > 0:
        return groups
    if not isinstance(groups, Sequence) or any(not isinstance(group, Sequence) for group in groups):
        raise InvalidArgumentError(f"groups: expected a number from 1 on, or a list of lists of parameters, got {groups!r}")
    seen: set[torch.Tensor] = set()
    for p in (p for group in groups for p in group):
        if not isinstance(p, torch.Tensor):
            raise InvalidArgumentError(f"groups: expected lists of parameters, got one with a {type(p).__name__}")
        if p in seen:
            raise InvalidArgumentError("groups: expected each parameter once, got one twice")
        seen.add(p)
    return [list(group) for group in groups]


def _check_settings(
    compression: Any, passes: int, op: Any, predivide: float, groups: Any, sparse_as_dense: bool, process_set: ProcessSet
) -> Settings:
    _check_passes(passes)
    op = choose_op(None, op, "DistributedOptimizer")
    if predivide != 1.0 and op != Average:
        raise InvalidArgumentError(f"gradient_predivide_factor: expected op to be Average, got {op.name}")
    if not predivide > 0:
        raise InvalidArgumentError(f"gradient_predivide_factor: expected a number above 0, got {predivide}")
    if not (isinstance(compression, type) and issubclass(compression, Compressor)):
        raise InvalidArgumentError(
            f"compression: expected Compression.none, Compression.fp16 or Compression.bf16, got {compression!r}"
        )
    number_of(process_set, "DistributedOptimizer")
    return Settings(compression, op, passes, float(predivide), groups, bool(sparse_as_dense), process_set)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.nn.Parameter]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """Make `optimizer` reduce its gradients over ranks in step(). Returns the same object, with its class, state and groups.

    optimizer: any torch optimizer. Call this again after adding parameters, or unfreezing some that were frozen by now; those
    that are frozen later, on all ranks, are in no bucket from the sixth step on and may come back at any time.
    named_parameters: (name, parameter) pairs, for error texts and to find mistakes; names unique, all parameters named.
    compression: Compression.none, fp16 or bf16 on the wire. Sums accumulate in float32.
    backward_passes_per_step: gradients of this many backward passes are added up before they are reduced.
    op: Average (default), Sum, Min, Max, Product or Adasum. A gradient that only some ranks have counts as zero on the others.
    gradient_predivide_factor: with Average: gradients are divided by it before the sum, the sum is multiplied by it after.
    groups: which gradients travel together: how many groups to divide the parameters into, or lists of parameters (others go
    alone). Without it, buckets of about ROUNDEL_BUCKET_BYTES (8M; rank 0's counts). num_groups: its older name.
    sparse_as_dense: sparse gradients travel as dense ones and become sparse again, rather than being gathered from all ranks.
    process_set: the ranks to reduce over; on others the optimizer takes its own steps.

    Parameters that get no gradient on any rank keep grad None. From backward() to step() gradients belong to the optimizer:
    changing or replacing one is an error in step(). Memory: one more copy of the gradients.
    With op=Adasum the step is taken with this rank's gradients, and what it changed is combined; skip_synchronize() raises
    then. Raises InvalidArgumentError, a ValueError, at once, MismatchError (ranks have different parameters or arguments; the
    job can go on) from the first step(), PeerLostError etc. from any.
    """
    named = _check_named(optimizer, named_parameters)
    groups = _check_groups(num_groups, groups)
    settings = _check_settings(
        compression, backward_passes_per_step, op, gradient_predivide_factor, groups, sparse_as_dense, process_set
    )
    alone = world.size() == 1 or not process_set.included() or process_set.size() == 1
    if not alone:
        _check_supported(named)
    if not hasattr(vars(optimizer).get("step", _Distributed.step), "_wrapped_by_lr_sched"):
        raise InvalidArgumentError("DistributedOptimizer: expected an optimizer with its class's step(), got a replaced one")
    vars(optimizer).pop("step", None)  # a scheduler made before this put it there, where it would hide ours
    base = optimizer._base if isinstance(optimizer, _Wrapped) else type(optimizer)
    kind = _DistributedAdasum if settings.op == Adasum and not alone else _Distributed
    optimizer.__class__ = type(base.__name__, (kind, base), {"_base": base, "__module__": base.__module__})
    if kind is _DistributedAdasum:
        optimizer._reducer = None  # of an earlier wrapping: its hooks go
        optimizer._settings, optimizer._names = settings, {p: name for name, p in named if p.requires_grad}
    else:
        optimizer._skip = False
        optimizer._reducer = None if alone else Reducer(named, settings)
    return optimizer
