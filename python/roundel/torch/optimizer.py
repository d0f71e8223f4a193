"""DistributedOptimizer: an optimizer whose gradients are reduced over ranks while backward is still running."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from roundel.errors import InvalidArgumentError, RoundelError
from roundel.ops import Average, ReduceOp
from roundel.torch.compression import Compression, Compressor
from roundel.torch.ops import allreduce
from roundel.torch.reducer import Reducer
from roundel.world import rank, size

__all__ = ["DistributedOptimizer"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _reduce_loss(loss: Any, op: ReduceOp) -> Any:
    if isinstance(loss, torch.Tensor):
        return allreduce(loss.detach(), op=op, name="closure's loss")
    if isinstance(loss, (int, float)):
        return allreduce(torch.tensor(loss, dtype=torch.float64), op=op, name="closure's loss").item()
    return loss


class _Distributed:
    """What DistributedOptimizer puts in front of the class of the optimizer that it is given."""

    _base: type[torch.optim.Optimizer]
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
                return loss if self._skip or self._reducer is None else _reduce_loss(loss, self._reducer.op)

            result = super().step(reduced_closure)
        if self._reducer is not None:
            self._reducer.synchronized = False
        return result

    # torch must neither call step hooks around this step too (the base class's step does), nor replace it on the instance.
    step.hooked = True
    step._wrapped_by_lr_sched = True

    def zero_grad(self, *args, **kwargs) -> None:
        """As torch's. Raises RoundelError between backward() and step(), when gradients are on their way.

        After an exception in backward() it gives up the step, as all ranks have to: those that call step() instead get a
        RoundelError that says so, and none uses the gradients.
        """
        if self._reducer is not None:
            self._reducer.abandon()
        super().zero_grad(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        """Copies and pickles are plain optimizers: hooks and shared memory belong to this process and these parameters."""
        return object.__new__, (self._base,), self.__getstate__()


def _check_named(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]] | None
) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of each of the optimizer's parameters, once."""
    params = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    if named is None:
        return [(f"parameter {i}", p) for i, p in enumerate(params)]
    named = list(named)
    if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in named):
        raise ValueError("named_parameters: expected (name, parameter) pairs such as model.named_parameters()")
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"named_parameters: expected each name once, got {', '.join(duplicates)} more often")
    name_of = {p: name for name, p in reversed(named)}  # tied weights may come under several names: the first counts
    missing = sum(p not in name_of for p in params)
    if missing:
        raise ValueError(f"named_parameters: {missing} of the optimizer's {len(params)} parameters have no name")
    return [(name_of[p], p) for p in params]


def _check_supported(named: list[tuple[str, torch.nn.Parameter]]) -> None:
    for name, p in named:
        if p.device.type != "cpu":
            raise InvalidArgumentError(f"DistributedOptimizer: expected parameters on the CPU, got '{name}' on {p.device}")
        if p.requires_grad and p.dtype not in _DTYPES:
            raise InvalidArgumentError(
                f"DistributedOptimizer: expected float32, float64, float16 or bfloat16, got '{name}' of {p.dtype}"
            )


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
) -> torch.optim.Optimizer:
    """Make `optimizer` reduce its gradients over ranks in step(). Returns the same object, with its class, state and groups.

    optimizer: any torch optimizer over dense CPU parameters. Call this again after adding or unfreezing parameters.
    named_parameters: (name, parameter) pairs, for error texts and to find mistakes; names unique, all parameters named.
    compression: Compression.none, fp16 or bf16 on the wire. Sums accumulate in float32.
    backward_passes_per_step: gradients of this many backward passes are added up before they are reduced.
    op: Average (default), Sum, Min, Max or Product. A gradient that only some ranks have counts as zero on the others.

    Buckets hold about ROUNDEL_BUCKET_BYTES (8M; rank 0's counts). Parameters that get no gradient on any rank keep grad None.
    From backward() to step() gradients belong to the optimizer: changing or replacing one is an error in step().
    Memory: one more copy of the gradients. Raises ValueError and InvalidArgumentError at once, MismatchError (ranks have
    different parameters or arguments; the job can go on) from the first step(), PeerLostError etc. from any.
    """
    named = _check_named(optimizer, named_parameters)
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step: expected at least 1, got {backward_passes_per_step}")
    if size() > 1:
        _check_supported(named)
    if not hasattr(vars(optimizer).get("step", _Distributed.step), "_wrapped_by_lr_sched"):
        raise InvalidArgumentError("DistributedOptimizer: expected an optimizer with its class's step(), got a replaced one")
    vars(optimizer).pop("step", None)  # a scheduler made before this put it there, where it would hide ours
    base = optimizer._base if isinstance(optimizer, _Distributed) else type(optimizer)
    optimizer.__class__ = type(base.__name__, (_Distributed, base), {"_base": base, "__module__": base.__module__})
    optimizer._skip = False
    optimizer._reducer = Reducer(named, compression, ReduceOp(op), backward_passes_per_step) if size() > 1 else None
    return optimizer
