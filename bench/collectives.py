"""The table of collectives: how each is called, what must come out, and what its figures are measured against.

Sizes are those of nccl-tests: `count` elements are what a rank brings (all-reduce, reduce-scatter, broadcast, all-to-all)
or gets (all-gather). busbw = algbw * busbw(P) makes figures comparable with a link's speed, whatever P; the factors are
nccl-tests' own (doc/PERFORMANCE.md). traffic(P) is the memory traffic of all P ranks together that no implementation can
avoid, in units of the size. A new collective is a row here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.data import DType, Numbers

Run = Callable[[], object]
Piece = tuple[np.ndarray, int, int]  # elements of a result: table, where in it they start, how many


@dataclass(frozen=True)
class Collective:
    name: str
    busbw: Callable[[int], float]
    traffic: Callable[[int], float]
    call: Callable[..., Run]  # (comm, x, out, op); x is out where it works in place
    expected: Callable[[Job, int, int], list[Piece]]  # (job, count, calls)
    brings: Callable[[int, int], int] = lambda count, size: count
    gets: Callable[[int, int], int] = lambda count, size: count
    divides: bool = False  # count is a multiple of the ranks
    reduces: bool = False
    in_place: tuple[str, ...] = ()  # variants
    has_input: Callable[[int], bool] = lambda rank: True  # False where this rank's buffer is only written


@dataclass
class Job:
    """What the cases of one run share. comm: roundel.Communicator."""

    comm: object
    dtype: DType
    op: str
    numbers: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.size = self.comm.rank, self.comm.size
        self.numbers = Numbers(self.dtype, self.op, self.size)


def _share(count: int, size: int) -> int:
    return count // size


def _others(size: int) -> float:
    return (size - 1) / size


def _from_every_rank(job: Job, start: int, each: int) -> list[Piece]:
    return [(table, start, each) for table in job.numbers.tables]


ROOT = 0

COLLECTIVES = {
    row.name: row
    for row in (
        Collective(
            "allreduce",
            busbw=lambda p: 2 * _others(p),
            traffic=lambda p: 2 * p,  # every rank's input is read and its result written; stages stay in cache
            call=lambda comm, x, out, op: functools.partial(comm.allreduce, x, op, out),
            expected=lambda job, count, calls: [(job.numbers.reduced(calls), 0, count)],
            reduces=True,
            in_place=("arena",),
        ),
        Collective(
            "reduce_scatter",
            busbw=_others,
            traffic=lambda p: p * (1 + 1 / p),  # a rank reads all it brings and writes its share
            call=lambda comm, x, out, op: functools.partial(comm.reduce_scatter, x, op, out),
            expected=lambda job, count, calls: [(job.numbers.reduced(1), job.rank * (count // job.size), count // job.size)],
            gets=_share,
            divides=True,
            reduces=True,
        ),
        Collective(
            "allgather",
            busbw=_others,
            traffic=lambda p: p * (1 / p + 1),  # a rank reads its share and writes all
            call=lambda comm, x, out, op: functools.partial(comm.allgather, x, None, out),
            expected=lambda job, count, calls: _from_every_rank(job, 0, count // job.size),
            brings=_share,
            divides=True,
        ),
        Collective(
            "broadcast",
            busbw=lambda p: 1.0,
            traffic=lambda p: p if p > 1 else 0,  # root reads, the p - 1 others write; it is in place, so root writes nothing
            call=lambda comm, x, out, op: functools.partial(comm.broadcast, out, ROOT),
            expected=lambda job, count, calls: [(job.numbers.tables[ROOT], 0, count)],
            in_place=("private", "arena"),
            has_input=lambda rank: rank == ROOT,
        ),
        Collective(
            "alltoall",
            busbw=_others,
            traffic=lambda p: 2 * p,  # a rank reads all it brings and writes as much
            call=lambda comm, x, out, op: functools.partial(comm.alltoall, x, out),
            expected=lambda job, count, calls: _from_every_rank(job, job.rank * (count // job.size), count // job.size),
            divides=True,
        ),
    )
}

# The ceilings: what the memory gives when every rank does this to private buffers at the same time. An update in place is the
# faster one: what is written has been read, whereas a copy has to fetch the lines of its target too, or go around the cache.
_ZERO = np.zeros((), np.uint8)

CEILINGS = {
    row.name: row
    for row in (
        Collective(
            "copy",
            busbw=lambda p: 1.0,
            traffic=lambda p: 2 * p,
            call=lambda comm, x, out, op: functools.partial(np.copyto, out.view(np.uint8), x.view(np.uint8)),
            expected=lambda job, count, calls: [(job.numbers.tables[job.rank], 0, count)],
        ),
        Collective(
            "update",
            busbw=lambda p: 1.0,
            traffic=lambda p: 2 * p,
            call=lambda comm, x, out, op: functools.partial(np.bitwise_or, out.view(np.uint8), _ZERO, out.view(np.uint8)),
            expected=lambda job, count, calls: [(job.numbers.tables[job.rank], 0, count)],
            in_place=("update",),
        ),
    )
}

SOCKET = "socket"  # the ceiling between hosts, a row that bench/hosts.py makes of a connection
CEILING_NAMES = (*CEILINGS, SOCKET)
