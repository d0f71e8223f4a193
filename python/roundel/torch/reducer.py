"""The gradients of one optimizer on their way: hooks, buckets, and when each is launched.

Buckets are planned once, in the first step, in the order in which rank 0's gradients became ready; every rank launches them in
that order, whatever the order of its own gradients, because collectives are ordered. The last one waits for synchronize(): it
tells whether every rank has come so far, so that a rank whose backward pass failed can give up the step without anybody using
half of it.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from roundel import _core
from roundel.errors import InvalidArgumentError, RoundelError
from roundel.ops import ReduceOp
from roundel.torch.agree import describe, require_same
from roundel.torch.buckets import Bucket, plan_buckets
from roundel.torch.compression import Compressor
from roundel.world import communicator, rank

__all__ = ["Reducer"]

_reducer_of = WeakTensorKeyDictionary()  # parameter -> weak reference to the Reducer whose hooks it has


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class Reducer:
    """Hooks on parameters, which it takes over from the Reducer that had them before. The hooks go when it goes."""

    def __init__(
        self, named: list[tuple[str, torch.nn.Parameter]], compression: type[Compressor], op: ReduceOp, passes: int
    ) -> None:
        self.names = {p: f"'{name}'" for name, p in named if p.requires_grad}
        self.params = list(self.names)
        self.compression, self.op, self.passes = compression, op, passes
        self.buckets: list[Bucket] = []
        self.place: dict[torch.nn.Parameter, tuple[Bucket, int]] = {}
        self.synchronized = False
        self._start_over()
        ready = weakref.WeakMethod(self._ready)
        hooks = [p.register_post_accumulate_grad_hook(lambda param: ready()(param)) for p in self.params]
        self.close = weakref.finalize(self, _remove, hooks)
        for p in self.params:
            previous = _reducer_of.get(p, lambda: None)()
            if previous is not None:
                previous.close()
            _reducer_of[p] = weakref.ref(self)

    def _start_over(self) -> None:
        self.passes_left = dict.fromkeys(self.params, self.passes)
        self.next_launch = 0
        self.handed_over = False  # some gradient belongs to us until synchronize()
        self.backward_unfinished = False  # hooks ran in a backward pass that has not ended: it runs, or an exception ended it
        self.ready_before_plan: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}  # gradient and its count of changes

    def _backward_ended(self) -> None:
        self.backward_unfinished = False

    def _ready(self, param: torch.nn.Parameter) -> None:
        self.synchronized = False
        if not self.backward_unfinished:
            self.backward_unfinished = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)  # not called after an exception
        if self.passes_left[param] == 0:
            raise RoundelError(
                f"rank {rank()}: the gradient of {self.names[param]} was computed more than {self.passes} times before step(): "
                "give DistributedOptimizer backward_passes_per_step, or call step() or synchronize() in between, "
                "or the optimizer's zero_grad() if a backward pass failed"
            )
        if param.grad.layout != torch.strided:
            raise InvalidArgumentError(
                f"rank {rank()}: the gradient of {self.names[param]} is sparse; make its layer's gradients dense (sparse=False)"
            )
        self.passes_left[param] -= 1
        is_final = self.passes_left[param] == 0
        self.handed_over |= is_final
        if not self.buckets:
            if is_final:
                self.ready_before_plan[param] = (param.grad, param.grad._version)
            return
        bucket, slot = self.place[param]
        if not is_final:
            bucket.note_version()
            return
        bucket.put(slot)
        while self.next_launch < len(self.buckets) - 1 and self.buckets[self.next_launch].complete:
            self._launch_next()

    def _launch_next(self) -> None:
        self.buckets[self.next_launch].launch()
        self.next_launch += 1

    def _finish(self) -> list[int]:
        """Launch what is left and wait for all. Returns the ranks that gave up."""
        while self.next_launch < len(self.buckets):
            self._launch_next()
        gave_up = [bucket.wait() for bucket in self.buckets]
        self._start_over()
        return gave_up[-1]

    def _plan(self) -> None:
        arguments = f"{self.op.name}, compression {self.compression.__name__}, {self.passes} backward passes per step"
        require_same("DistributedOptimizer", [arguments, *(describe(self.names[p].strip("'"), p) for p in self.params)])
        number = {p: i for i, p in enumerate(self.params)}
        last_first = [p for p in reversed(self.params) if p not in self.ready_before_plan]
        order = torch.tensor([number[p] for p in [*self.ready_before_plan, *last_first]], dtype=torch.int64)
        communicator().broadcast(order, 0, name="order of gradients")
        bucket_bytes = torch.tensor([_core.setting_bytes("ROUNDEL_BUCKET_BYTES")])
        communicator().broadcast(bucket_bytes, 0, name="size of buckets")
        in_order = [self.params[i] for i in order.tolist()]
        self.buckets = plan_buckets(in_order, self.names, int(bucket_bytes), self.compression, self.op)
        self.place = {p: (bucket, slot) for bucket in self.buckets for slot, p in enumerate(bucket.params)}

    def _changed(self) -> list[str]:
        """Which gradients were written to or replaced by others than autograd since they became ours."""
        before_plan = [
            f"gradient of {self.names[p]}"
            for p, (grad, version) in self.ready_before_plan.items()
            if p.grad is not grad or grad._version != version
        ]
        return before_plan + [bucket.name for bucket in self.buckets if bucket.changed()]

    def synchronize(self, params: list[torch.nn.Parameter]) -> None:
        """Launch what is left, wait for all, and put the reduced gradients in place.

        params: all that the optimizer will change. What is wrong is raised after the collectives, so that no other rank waits.
        """
        if not self.close.alive:
            raise RoundelError(f"rank {rank()}: a DistributedOptimizer made later has this one's parameters: use that one")
        changed = self._changed()
        strangers = sum(p.grad is not None and p not in self.names for p in params)
        gave_up: list[int] = []
        if self.params:
            if not self.buckets:
                self._plan()
            for bucket in self.buckets:
                for slot, p in enumerate(bucket.params):
                    if bucket.is_pending(slot):
                        bucket.leave_out(slot) if p.grad is None else bucket.put(slot)
            gave_up = self._finish()
        if gave_up:
            raise RoundelError(
                f"rank {rank()}: rank {', '.join(map(str, gave_up))} gave up this step after an exception in backward(); "
                "no parameter was changed: call zero_grad() and go on with the next step, or stop"
            )
        if changed:
            raise RoundelError(
                f"rank {rank()}: {changed[0]}: changed between backward() and step(), while being reduced; "
                "call synchronize() first, then change gradients, then `with optimizer.skip_synchronize(): optimizer.step()`"
            )
        if strangers:
            raise InvalidArgumentError(
                f"rank {rank()}: {strangers} parameters have gradients but were frozen, or not in the optimizer, when "
                "DistributedOptimizer was made; call it on the optimizer again: DistributedOptimizer(optimizer, ...)"
            )
        self.synchronized = True

    def abandon(self) -> None:
        """The caller throws the gradients away. An error when they have been handed over, unless the backward pass failed."""
        if self.handed_over and not self.backward_unfinished:
            raise RoundelError(
                f"rank {rank()}: zero_grad() between backward() and step() would throw away gradients that are being reduced; "
                "call step() or synchronize() first"
            )
        if self.handed_over and self.buckets:
            self.buckets[-1].give_up()
            self._finish()
        else:
            self._start_over()
