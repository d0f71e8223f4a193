"""DistributedOptimizer: an optimizer whose gradients are reduced over ranks while backward is still running."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable

import torch

from roundel import _core
from roundel.errors import InvalidArgumentError, RoundelError
from roundel.ops import Average, ReduceOp
from roundel.torch.buckets import Bucket, plan_buckets
from roundel.torch.compression import Compression, Compressor
from roundel.world import communicator, rank, size

__all__ = ["DistributedOptimizer"]


class _Reducer:
    """The gradients of some parameters on their way: hooks, buckets, and when each is launched.

    Buckets are planned once, at the end of the first backward pass, in the order in which rank 0's gradients became ready; every rank
    launches them in that order, whatever the order of its own gradients, because collectives are ordered.
    """

    def __init__(
        self, named: list[tuple[str, torch.nn.Parameter]], compression: type[Compressor], op: ReduceOp, passes: int
    ) -> None:
        self.names = {p: name for name, p in named}
        self.params = [p for _, p in named if p.requires_grad]
        self.compression, self.op, self.passes = compression, op, passes
        self.buckets: list[Bucket] = []
        self.place: dict[torch.nn.Parameter, tuple[Bucket, int]] = {}
        self.seen_order: dict[torch.nn.Parameter, None] = {}
        self.passes_left = dict.fromkeys(self.params, passes)
        self.next_launch = 0
        self.synchronized = False
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, param: torch.nn.Parameter) -> None:
        self.synchronized = False
        if self.passes_left[param] == 0:
            raise RoundelError(
                f"rank {rank()}: the gradient of '{self.names[param]}' was computed more than {self.passes} times before step(): "
                "give DistributedOptimizer backward_passes_per_step, or call step() or synchronize() in between"
            )
        if param.grad.layout != torch.strided:
            raise InvalidArgumentError(
                f"rank {rank()}: the gradient of '{self.names[param]}' is sparse; make its layer's gradients dense (sparse=False)"
            )
        self.passes_left[param] -= 1
        if self.passes_left[param] > 0:
            return
        if not self.buckets:
            self.seen_order[param] = None
            return
        bucket, slot = self.place[param]
        bucket.put(slot)
        self._launch_complete()

    def _launch_complete(self) -> None:
        while self.next_launch < len(self.buckets) and self.buckets[self.next_launch].complete:
            self.buckets[self.next_launch].launch(self.op)
            self.next_launch += 1

    def _plan(self) -> None:
        number = {p: i for i, p in enumerate(self.params)}
        last_first = [p for p in reversed(self.params) if p not in self.seen_order]
        order = torch.tensor([number[p] for p in [*self.seen_order, *last_first]], dtype=torch.int64)
        communicator().broadcast(order, 0, name="order of gradients")
        self.buckets = plan_buckets(
            [self.params[i] for i in order.tolist()], _core.setting_bytes("ROUNDEL_BUCKET_BYTES"), self.compression
        )
        self.place = {p: (bucket, slot) for bucket in self.buckets for slot, p in enumerate(bucket.params)}

    @property
    def in_flight(self) -> bool:
        return self.next_launch > 0

    def synchronize(self) -> None:
        """Launch what is left, wait for all, and put the reduced gradients in place."""
        if not self.params:
            return
        if not self.buckets:
            self._plan()
        for bucket in self.buckets[self.next_launch :]:
            for slot, p in enumerate(bucket.params):
                if bucket.is_pending(slot):
                    bucket.leave_out(slot) if p.grad is None else bucket.put(slot)
        self._launch_complete()
        self.next_launch = 0
        for bucket in self.buckets:
            bucket.wait()
        self.passes_left = dict.fromkeys(self.params, self.passes)
        self.synchronized = True


class _DistributedOptimizer(torch.optim.Optimizer):
    """What DistributedOptimizer adds to the class of the optimizer that it is given."""

    _base: type[torch.optim.Optimizer]
    _reducer: _Reducer | None
    _skip: bool

    def synchronize(self) -> None:
        """Wait until this step's gradients are reduced, for example to clip them before `with skip_synchronize(): step()`."""
        if self._reducer is not None:
            self._reducer.synchronize()

    @contextlib.contextmanager
    def skip_synchronize(self):
        """step() inside this context takes the gradients as they are; call synchronize() first."""
        self._skip = True
        try:
            yield
        finally:
            self._skip = False

    def step(self, closure=None):
        """Reduce the gradients over ranks, then update the parameters. A closure's gradients are reduced whenever it is called."""
        if closure is None:
            if not self._skip:
                if self._reducer is not None and self._reducer.synchronized:
                    warnings.warn(
                        "step() after synchronize() reduces the gradients again; use `with optimizer.skip_synchronize()`",
                        stacklevel=2,
                    )
                self.synchronize()
            return self._base.step(self)

        def reduced_closure():
            loss = closure()
            if not self._skip:
                self.synchronize()
            return loss

        return self._base.step(self, reduced_closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Raises RoundelError between backward() and step(), when gradients are on their way."""
        if self._reducer is not None and self._reducer.in_flight:
            raise RoundelError(
                f"rank {rank()}: zero_grad() between backward() and step() would throw away gradients that are being reduced; "
                "call step() or synchronize() first"
            )
        self._base.zero_grad(self, set_to_none=set_to_none)


def _check_named(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]] | None
) -> list[tuple[str, torch.nn.Parameter]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if named is None:
        return [(f"parameter {i}", p) for i, p in enumerate(params)]
    named = list(named)
    if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in named):
        raise ValueError("named_parameters: expected (name, parameter) pairs such as model.named_parameters()")
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"named_parameters: expected each name once, got {', '.join(duplicates)} more often")
    known = {p for _, p in named}
    missing = sum(p not in known for p in params)
    if missing:
        raise ValueError(f"named_parameters: {missing} of the optimizer's {len(params)} parameters have no name")
    mine = set(params)
    return [(name, p) for name, p in named if p in mine]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
) -> torch.optim.Optimizer:
    """`optimizer` with gradients reduced over ranks: same class, same state, same parameter groups; step() does the rest.

    optimizer: any torch optimizer over dense CPU parameters. It shares its state with the result; use only the result.
    named_parameters: (name, parameter) pairs, for error texts and to find mistakes; names unique, all parameters named.
    compression: Compression.none, fp16 or bf16 on the wire. Sums accumulate in float32.
    backward_passes_per_step: gradients of this many backward passes are added up before they are reduced.
    op: Average (default), Sum, Min, Max or Product.

    Buckets hold about ROUNDEL_BUCKET_BYTES (8M). Parameters that get no gradient on any rank keep grad None.
    Memory: one more copy of the gradients. Raises ValueError and InvalidArgumentError at once, PeerLostError etc. from step().
    """
    named = _check_named(optimizer, named_parameters)
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step: expected at least 1, got {backward_passes_per_step}")
    elsewhere = [name for name, p in named if p.device.type != "cpu"]
    if elsewhere and size() > 1:
        raise InvalidArgumentError(f"DistributedOptimizer: expected parameters on the CPU, got '{elsewhere[0]}' elsewhere")
    body = {key: value for key, value in vars(_DistributedOptimizer).items() if key not in ("__dict__", "__weakref__")}
    cls = type(type(optimizer).__name__, (type(optimizer),), {**body, "_base": type(optimizer)})
    distributed = cls.__new__(cls)
    distributed.__dict__ = optimizer.__dict__
    distributed._skip = False
    distributed._reducer = _Reducer(named, compression, op, backward_passes_per_step) if size() > 1 else None
    return distributed
