"""The gradients of one optimizer on their way: hooks, buckets, and when each is launched.

Buckets are planned once, in the first step, in the order in which rank 0's gradients became ready; every rank launches them in
that order, whatever the order of its own gradients, because collectives are ordered. The last one waits for synchronize(): it
tells whether every rank has come so far, so that a rank whose backward pass failed can give up the step without anybody using
half of it. Which parameters have sparse gradients is agreed in the first step too; those are gathered through the engine.

Parameters that have been frozen on all ranks for a few steps are in no bucket. Buckets are planned anew at the end of a step in
which that became so of some, or in which some came back; these last go through the engine once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from roundel import _core
from roundel.errors import InvalidArgumentError, RoundelError
from roundel.ops import Average, Max, ReduceOp, Sum
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch import joining
from roundel.torch.agree import describe, require_same
from roundel.torch.allgather import allgather
from roundel.torch.allreduce import allreduce
from roundel.torch.buckets import Bucket, Route, Word, plan_buckets
from roundel.torch.compression import Compression, Compressor
from roundel.torch.sparse_gradients import SparseGradients
from roundel.world import rank

__all__ = ["Reducer", "Settings"]

_reducer_of = WeakTensorKeyDictionary()  # parameter -> weak reference to the Reducer whose hooks it has
_numbers = itertools.count(1)
_FROZEN_STEPS = 5  # in a row, after which new buckets are worth it: some programs freeze and thaw in turns


@dataclass(frozen=True)
class Settings:
    """DistributedOptimizer's arguments. groups: parameters that travel together, or into how many groups to divide them."""

    compression: type[Compressor] = Compression.none
    op: ReduceOp = Average
    passes: int = 1
    predivide: float = 1.0
    groups: int | Sequence[Sequence[torch.nn.Parameter]] | None = None
    sparse_as_dense: bool = False
    process_set: ProcessSet = global_process_set

    def divided(self, params: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]] | None:
        """The groups as lists of some of these parameters; None where there are none."""
        if self.groups is None:
            return None
        if isinstance(self.groups, int):
            size, more = divmod(len(params), self.groups)
            ends = list(itertools.accumulate(size + (i < more) for i in range(self.groups)))
            return [list(params[begin:end]) for begin, end in zip([0, *ends], ends, strict=False) if begin < end]
        known = set(params)
        return [[p for p in group if p in known] for group in self.groups]

    def describe(self, params: Sequence[torch.nn.Parameter]) -> str:
        """What ranks compare."""
        text = f"{self.op.name}, compression {self.compression.__name__}, {self.passes} backward passes per step"
        if self.predivide != 1.0:
            text += f", gradient_predivide_factor {self.predivide}"
        groups = self.divided(params)
        if groups is not None:
            number = {p: i for i, p in enumerate(params)}
            text += f", groups {[[number[p] for p in group] for group in groups]}"
        return text + (", sparse_as_dense" if self.sparse_as_dense else "")


def _is_frozen(param: torch.nn.Parameter) -> bool:
    return not param.requires_grad and param.grad is None


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class Reducer:
    """Hooks on parameters, which it takes over from the Reducer that had them before. The hooks go when it goes."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], settings: Settings) -> None:
        self.names = {p: f"'{name}'" for name, p in named if p.requires_grad}
        self.params = list(self.names)
        self.settings, self.op, self.passes = settings, settings.op, settings.passes
        self.number = next(_numbers)
        self.synchronized = False
        self.order: list[torch.nn.Parameter] = []  # in which gradients became ready, as last agreed on
        self.sparse_dims: dict[torch.nn.Parameter, int] = {}  # of parameters with sparse gradients, likewise
        self.frozen_for: dict[torch.nn.Parameter, int] = {}  # steps in a row, on this rank
        self.patience = _FROZEN_STEPS  # steps with one plan before another is worth a try
        self._forget_plan()
        self._start_over()
        joining.watch(self)
        ready = weakref.WeakMethod(self._ready)
        hooks = [p.register_post_accumulate_grad_hook(lambda param: ready()(param)) for p in self.params]
        self.close = weakref.finalize(self, _remove, hooks)
        for p in self.params:
            previous = _reducer_of.get(p, lambda: None)()
            if previous is not None:
                previous.close()
            _reducer_of[p] = weakref.ref(self)

    def _forget_plan(self) -> None:
        self.buckets: list[Bucket] = []
        self.place: dict[torch.nn.Parameter, tuple[Bucket, int]] = {}
        self.sparse: SparseGradients | None = None
        self.planned = self.lasting = self.direct = False
        self.left_out: dict[torch.nn.Parameter, None] = {}  # of the buckets: frozen on all ranks
        self.steps_planned = 0

    def _start_over(self) -> None:
        self.passes_left = dict.fromkeys(self.params, self.passes)
        self.next_launch = 0
        self.handed_over = False  # some gradient belongs to us until synchronize()
        self.backward_unfinished = False  # hooks ran in a backward pass that has not ended: it runs, or an exception ended it
        self.ready_before_plan: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}  # gradient and its count of changes

    def set_passes(self, passes: int) -> None:
        """How many backward passes make a step, from the next step on."""
        if self.handed_over or any(left != self.passes for left in self.passes_left.values()):
            raise RoundelError(f"rank {rank()}: set_backward_passes_per_step() between backward() and step()")
        self.passes = passes
        self.passes_left = dict.fromkeys(self.params, passes)

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
        self.passes_left[param] -= 1
        is_final = self.passes_left[param] == 0
        self.handed_over |= is_final
        if not self.planned:
            if is_final:
                self.ready_before_plan[param] = (param.grad, param.grad._version)
            return
        if param in self.sparse:
            if is_final:
                self.sparse.start(param)
            return
        if param not in self.place:  # it was left out: synchronize() sees to it
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

    def _finish(self) -> dict[Word, list[int]]:
        """Launch what is left and wait for all. Returns which ranks said what."""
        while self.next_launch < len(self.buckets):
            self._launch_next()
        for bucket in self.buckets:
            said = bucket.wait()
        self.sparse.finish()
        if not self.lasting:
            for p in self.place:  # views of one buffer share their count of changes, which an unplanned step looks at
                p.grad = None if p.grad is None else p.grad.clone()
            self._forget_plan()
        self._start_over()
        return said

    def _sparse_dim(self, param: torch.nn.Parameter) -> int:
        """0 for a dense gradient, or none up to now."""
        is_sparse = param.grad is not None and param.grad.layout == torch.sparse_coo
        return param.grad.sparse_dim() if is_sparse else self.sparse_dims.get(param, 0)

    def _has_settled(self, param: torch.nn.Parameter) -> bool:
        return self.frozen_for.get(param, 0) >= _FROZEN_STEPS

    def _plan(self) -> None:
        settings, params = self.settings, self.params
        process_set, count = settings.process_set, len(params)
        described = (describe(self.names[p].strip("'"), p) for p in params)
        require_same("DistributedOptimizer", [settings.describe(params), *described], process_set)
        number = {p: i for i, p in enumerate(params)}
        order = [number[p] for p in dict.fromkeys([*self.ready_before_plan, *self.order, *reversed(params)])]
        bucket_bytes = _core.setting_bytes("ROUNDEL_BUCKET_BYTES")
        mine = [bucket_bytes, self.number, joining.is_free(self), *order, *map(self._sparse_dim, params)]
        mine += [not self._has_settled(p) for p in params]
        rows = allgather(torch.tensor([mine], dtype=torch.int64), "order of gradients", process_set)
        bucket_bytes, label, is_free, *order = rows[0, : 3 + count].tolist()  # the first rank's, as all of this
        dims, live = (part.tolist() for part in rows[:, 3 + count :].amax(0).split(count))
        self.sparse_dims = sparse_dims = {p: dim for p, dim in zip(params, dims, strict=True) if dim}
        self.left_out = dict.fromkeys(p for p, is_live in zip(params, live, strict=True) if not is_live)
        left_in = any(self._has_settled(p) for p, is_live in zip(params, live, strict=True) if is_live)  # others train them
        self.patience = 2 * self.patience if left_in else _FROZEN_STEPS
        self.steps_planned = 0
        if sparse_dims and settings.op not in (Average, Sum) and not settings.sparse_as_dense:
            raise InvalidArgumentError(
                f"rank {rank()}: {settings.op.name} of sparse gradients such as {self.names[next(iter(sparse_dims))]}'s: "
                "give DistributedOptimizer sparse_as_dense=True"
            )
        # A rank that has joined takes part through the engine only, and did not see this plan: it is for one step then.
        self.lasting = len(rows) == process_set.size()
        self.direct = self.lasting and bool(is_free) and process_set is global_process_set
        if self.direct:
            joining.take(self)
        self.bucket_bytes = bucket_bytes
        self.route = route = Route(
            settings.op,
            settings.compression,
            1.0 / settings.predivide,
            settings.predivide,
            process_set,
            self.direct,
            f" (optimizer {label})",
        )
        self.order = [params[i] for i in order]
        in_order = [p for p in self.order if live[number[p]]]
        gathered = {} if settings.sparse_as_dense else sparse_dims
        self.sparse = SparseGradients({p: sparse_dims[p] for p in in_order if p in gathered}, self.names, route)
        # Where all are sparse, or frozen, an empty one stands in: ranks say what they have to say with the last bucket.
        in_buckets = [p for p in in_order if p not in gathered] or [torch.nn.Parameter(torch.empty(0))]
        groups = settings.divided([p for p in params if p not in gathered])
        names = self.names | {in_buckets[0]: self.names.get(in_buckets[0], "no parameter")}
        self.buckets = plan_buckets(in_buckets, names, bucket_bytes, route, groups, sparse_dims)
        self.place = {p: (bucket, slot) for bucket in self.buckets for slot, p in enumerate(bucket.params)}
        self.planned = True

    def _changed(self) -> list[str]:
        """Which gradients were written to or replaced by others than autograd since they became ours."""
        before_plan = [
            f"gradient of {self.names[p]}"
            for p, (grad, version) in self.ready_before_plan.items()
            if p.grad is not grad or grad._version != version
        ]
        started = self.sparse.changed() if self.planned else []
        return before_plan + started + [bucket.name for bucket in self.buckets if bucket.changed()]

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
            if not self.planned:
                self._plan()
            gave_up = self._reduce()
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

    def _reduce(self) -> list[int]:
        """Launch all, wait for all, and plan anew where that is due. Returns the ranks that gave up the step."""
        self.sparse.start_rest()
        frozen = [p for p in [*self.left_out, *self.sparse] if _is_frozen(p)]
        for bucket in self.buckets:
            for slot, p in enumerate(bucket.params):
                if not bucket.is_pending(slot):
                    continue
                bucket.leave_out(slot) if p.grad is None else bucket.put(slot)
                if _is_frozen(p):
                    frozen.append(p)
        self.frozen_for = {p: self.frozen_for.get(p, 0) + 1 for p in frozen}
        self.steps_planned += 1
        if self.steps_planned >= self.patience and any(self._has_settled(p) for p in frozen if p not in self.left_out):
            self.buckets[-1].say(Word.FROZEN)
        if any(p.grad is not None for p in self.left_out):
            self.buckets[-1].say(Word.THAWED)
        self.buckets[-1].say(Word.PRESENT)
        left_out = list(self.left_out)
        said = self._finish()
        if said[Word.GAVE_UP]:
            return said[Word.GAVE_UP]
        if said[Word.THAWED]:
            self._reduce_by_engine(left_out)
        # A rank in join() would not hear of another plan.
        everyone = self.settings.process_set.ranks
        if self.planned and said[Word.PRESENT] == everyone and (said[Word.THAWED] or said[Word.FROZEN] == everyone):
            self._plan()
        return []

    def _reduce_by_engine(self, params: list[torch.nn.Parameter]) -> None:
        """What is in no bucket. Ranks that have joined take part in this without knowing."""
        dims = torch.tensor([self._sparse_dim(p) for p in params])
        name = f"layouts of gradients that were left out{self.route.label}"
        dims = allreduce(dims, name=name, op=Max, process_set=self.settings.process_set).tolist()
        sparse_dims = {p: dim for p, dim in zip(params, dims, strict=True) if dim}
        route = replace(self.route, direct=False)
        buckets = plan_buckets(params, self.names, self.bucket_bytes, route, sparse_dims=sparse_dims)
        for bucket in buckets:
            for slot, p in enumerate(bucket.params):
                bucket.leave_out(slot) if p.grad is None else bucket.put(slot)
            bucket.launch()
        for bucket in buckets:
            bucket.wait()

    def abandon(self) -> None:
        """The caller throws the gradients away. An error when they have been handed over, unless the backward pass failed."""
        if self.handed_over and not self.backward_unfinished:
            raise RoundelError(
                f"rank {rank()}: zero_grad() between backward() and step() would throw away gradients that are being reduced; "
                "call step() or synchronize() first"
            )
        if self.handed_over:
            if not self.planned:
                self._plan()
            self.sparse.start_rest(empty=True)
            self.buckets[-1].say(Word.GAVE_UP)
            self._finish()
        else:
            self._start_over()

    def in_use(self) -> bool:
        """Steps of other ranks may wait for this rank's buckets."""
        return self.direct and self.close.alive

    def serve_step(self) -> bool:
        """Take part in a step of the other ranks without gradients. True when no rank has more data. See joining."""
        for bucket in self.buckets:
            for slot in range(len(bucket.params)):
                bucket.leave_out(slot)
        self.buckets[-1].say(Word.JOINED)
        joined = self._finish()[Word.JOINED]
        for p in self.params:
            p.grad = None
        return len(joined) == self.settings.process_set.size()
