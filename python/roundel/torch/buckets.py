"""Gradient buckets: flat buffers that the library allocates, into which many gradients go as views and which travel as one."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from roundel import world
from roundel.ops import Average, Max, Min, Product, ReduceOp, Sum
from roundel.process_sets import ProcessSet, global_process_set
from roundel.torch.compression import Compression, Compressor

__all__ = ["Bucket", "Route", "Word", "plan_buckets"]

_ALIGN = 64  # bytes: gradients start on cache lines

# Flags travel with the gradients and meet the same operator; what comes out differs from _NO just when some rank said _YES.
_NO = {Sum: 0, Average: 0, Max: 0, Min: 0, Product: 1}
_YES = {Sum: 1, Average: 1, Max: 1, Min: -1, Product: 0}


class Word(enum.IntEnum):
    """What a rank may say of a step, with its last bucket."""

    GAVE_UP = 0  # this step's gradients are not to be used
    JOINED = 1  # it has no more data
    FROZEN = 2  # parameters in the buckets have been frozen for some steps
    PRESENT = 3  # it takes part in this step by itself, not in join()
    THAWED = 4  # it has gradients of parameters that were left out of the buckets


@dataclass(frozen=True)
class Route:
    """How all buckets of an optimizer travel, the same on every rank.

    direct: as ordered collectives of the job's communicator; otherwise as named requests to the engine, which knows process
    sets. label: tells this optimizer's requests from those of others with the same parameter names.
    """

    op: ReduceOp
    compression: type[Compressor] = Compression.none
    prescale: float = 1.0
    postscale: float = 1.0
    process_set: ProcessSet = field(default=global_process_set)
    direct: bool = True
    label: str = ""

    @property
    def yes(self) -> float:
        """A flag's value that survives being scaled before the sum."""
        return _YES[self.op] * max(1.0, 1.0 / self.prescale)

    @property
    def no(self) -> float:
        """The value of a flag that is not raised."""
        return _NO[self.op]

    def reduce(self, buffer: torch.Tensor, name: str):
        """Start the all-reduce in place. Returns a handle with wait()."""
        scales = {"prescale": self.prescale, "postscale": self.postscale}
        if self.direct:
            return world.communicator().allreduce_async(buffer, self.op, buffer, name=name, **scales)
        name += self.label
        return world.engine().allreduce(
            [buffer], [buffer], self.op, name=name, process_set=self.process_set.process_set_id, **scales
        )


def _allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that the ranks of this host share."""
    flat = torch.from_numpy(world.communicator().allocate(count * dtype.itemsize)).view(dtype)
    return flat.zero_()


class Bucket:
    """Some parameters' gradients side by side, and one flag for each that says whether any rank has a gradient for it.

    The last bucket of a step also has a flag for each rank and Word.

    Life of a step: put() or leave_out() for every parameter, launch() when none is pending, wait().
    Parameters are on one device. The bucket is there too; what travels is on the CPU.
    """

    def __init__(
        self,
        name: str,
        params: Sequence[torch.nn.Parameter],
        route: Route,
        is_last: bool,
        sparse_dims: Mapping[torch.nn.Parameter, int] | None = None,
    ) -> None:
        self.name, self.params, self._route = name, list(params), route
        self._ranks = route.process_set.ranks
        self._sparse_dims = sparse_dims or {}  # of parameters whose gradients leave the bucket as sparse tensors
        dtype, device = self.params[0].dtype, self.params[0].device
        step = _ALIGN // dtype.itemsize
        offsets, end = [], 0
        for p in self.params:
            offsets.append(end)
            end += -(-p.numel() // step) * step
        flags = end + len(self.params)
        count = flags + (len(Word) * len(self._ranks) if is_last else 0)
        on_cpu = device.type == "cpu"
        self._flat = _allocate(count, dtype) if on_cpu else torch.zeros(count, dtype=dtype, device=device)
        self.views = [self._flat[o : o + p.numel()].view_as(p) for o, p in zip(offsets, self.params, strict=True)]
        self._used = self._flat[end:flags]
        self._per_rank = self._flat[flags:].view(len(Word), len(self._ranks) if is_last else 0)
        wire = route.compression.wire_dtype(dtype)
        self._wire = self._flat if wire == dtype and on_cpu else _allocate(count, wire)
        self._handle = None
        self._reset()

    def _reset(self) -> None:
        self._pending = set(range(len(self.params)))
        self._version: int | None = None
        self._per_rank.fill_(self._route.no)

    @property
    def complete(self) -> bool:
        """Every parameter has said what its gradient is."""
        return not self._pending

    def is_pending(self, slot: int) -> bool:
        """This parameter has not said yet."""
        return slot in self._pending

    def put(self, slot: int) -> None:
        """The parameter's gradient is ready: it becomes a view of the bucket, copied there unless it is that already."""
        param, view = self.params[slot], self.views[slot]
        gradient = param.grad.detach()
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        if gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            param.grad = view
        self._used[slot] = self._route.yes
        self._pending.discard(slot)
        self.note_version()

    def leave_out(self, slot: int) -> None:
        """This rank has no gradient for the parameter: it counts as zero if another rank has one."""
        self.views[slot].zero_()
        self._used[slot] = self._route.no
        self._pending.discard(slot)

    def note_version(self) -> None:
        """All changes so far were autograd's or ours. Views share one counter of changes, so a later change to any shows."""
        self._version = self._flat._version

    def changed(self) -> bool:
        """Somebody else wrote to a gradient that was put here, or replaced it."""
        if self._version is None:
            return False
        put = (slot for slot in range(len(self.params)) if slot not in self._pending)
        return any(not self._holds(self.params[slot].grad, slot) for slot in put) or self._version != self._flat._version

    def _holds(self, gradient: torch.Tensor | None, slot: int) -> bool:
        strided = gradient is not None and gradient.layout == torch.strided
        return strided and gradient.data_ptr() == self.views[slot].data_ptr()

    def say(self, word: Word) -> None:
        """To all ranks, with the last bucket."""
        self._per_rank[word, self._ranks.index(world.rank())] = self._route.yes

    def launch(self) -> None:
        """Start the all-reduce."""
        if self._wire is not self._flat:
            self._wire.copy_(self._flat)
        self._handle = self._route.reduce(self._wire, self.name)

    def wait(self) -> dict[Word, list[int]]:
        """Finish the all-reduce; reduced gradients are in place, those that no rank has become None.

        Returns which ranks said what; of the last bucket.
        """
        handle, self._handle = self._handle, None
        handle.wait()
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)
        used, per_rank = self._used.ne(self._route.no).tolist(), self._per_rank.ne(self._route.no).tolist()
        for param, view, is_used in zip(self.params, self.views, used, strict=True):
            sparse_dim = self._sparse_dims.get(param)
            param.grad = None if not is_used else view if sparse_dim is None else view.to_sparse(sparse_dim)
        self._reset()
        return {word: [self._ranks[i] for i, flag in enumerate(per_rank[word]) if flag] for word in Word}


def _title(names: Sequence[str]) -> str:
    return f"gradient of {names[0]}" if len(names) == 1 else f"gradients of {names[0]} to {names[-1]}"


_Params = Sequence[torch.nn.Parameter]


def _fill(params: _Params, bucket_bytes: int) -> list[list[torch.nn.Parameter]]:
    """Parameters in the order given, one dtype and device in a list, up to bucket_bytes. Lists in the order of their last."""
    lists: list[list[torch.nn.Parameter]] = []
    filling: dict[tuple, tuple[list[torch.nn.Parameter], int]] = {}  # by last parameter
    for p in params:
        kind = (p.dtype, p.device)
        members, filled = filling.pop(kind, ([], 0))
        limit = bucket_bytes if lists else min(bucket_bytes, 1 << 20)
        nbytes = p.numel() * p.element_size()
        if members and nbytes >= limit:
            lists.append(members)
            members, filled = [], 0
        members.append(p)
        if filled + nbytes >= limit:
            lists.append(members)
        else:
            filling[kind] = (members, filled + nbytes)
    return lists + [members for members, _ in filling.values()]


def _by_group(params: _Params, groups: Sequence[_Params]) -> list[list[torch.nn.Parameter]]:
    """One list for each group, or one for each of its dtypes and devices, in the order in which groups become complete."""
    group_of = {p: (i, p.dtype, p.device) for i, group in enumerate(groups) for p in group}
    lists: dict[object, list[torch.nn.Parameter]] = {}
    for p in params:
        key = group_of.get(p, p)  # a parameter of no group travels alone
        lists[key] = [*lists.pop(key, []), p]
    return list(lists.values())


def plan_buckets(
    params: _Params,
    names: Mapping[torch.nn.Parameter, str],
    bucket_bytes: int,
    route: Route,
    groups: Sequence[_Params] | None = None,
    sparse_dims: Mapping[torch.nn.Parameter, int] | None = None,
) -> list[Bucket]:
    """Fill buckets with parameters in the order given, one dtype in each. The first is small, so that the wire is busy early.

    Every rank must give the same order. A parameter larger than a bucket gets one of its own. groups: what travels together,
    whatever its size.
    """
    lists = _fill(params, bucket_bytes) if groups is None else _by_group(params, groups)
    return [Bucket(_title([names[p] for p in members]), members, route, members is lists[-1], sparse_dims) for members in lists]
