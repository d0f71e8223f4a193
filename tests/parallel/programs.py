"""Random programs of collectives, checked against arithmetic.

A program is drawn from a seed, the same on every rank. A kind of operation is a function in KINDS that takes a Draw and says
what to call and what the result must be; a new one is one such function.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import roundel
from reference import DTYPES, assert_equal_bits, over_ranks, ranks_data

BIG = 600_000  # elements of the largest arrays, and few of them


@dataclass
class Step:
    """comm.<method>(*arguments, **keywords), or its _async form. expected: the result. also: what else to check afterwards."""

    method: str
    arguments: tuple
    keywords: dict = field(default_factory=dict)
    expected: np.ndarray | None = None
    also: Callable[[], None] = lambda: None


class Draw:
    """What chance has decided for one operation."""

    def __init__(self, rng: random.Random, rank: int, size: int, number: int, comm) -> None:
        self.rank, self.size, self.number, self.comm = rank, size, number, comm
        self.dtype = rng.choice(DTYPES)
        self.count = rng.choice((0, 1, rng.randrange(64), int(10 ** rng.uniform(0, 3.5)), int(10 ** rng.uniform(0, 5))))
        if rng.random() < 0.01:
            self.count = rng.randrange(BIG)
        ops = ["Sum", "Min", "Max"]
        if self.dtype.startswith(("int", "uint")) or (self.dtype != "bool" and size & (size - 1) == 0):
            ops.append("Average")  # of floats exact only where dividing by the size is
        ops += ["Product"] if self.dtype in ("int32", "int64", "float32", "float64") else []  # 4^8 fits these only
        self.op = rng.choice(ops)
        self.root = rng.randrange(size)
        self.in_place = rng.random() < 0.5
        self.asynchronous = rng.random() < 0.4
        self.name = rng.choice(("", f"tensor.{rng.randrange(50)}", "a longer name with a 'quote' and ünicode"))
        self.rows = [rng.randrange(self.count + 1) for _ in range(size)]
        self.shift = rng.randrange(1, size) if size > 1 else 0

    def data(self, rank: int | None = None, count: int | None = None) -> np.ndarray:
        """Of a rank, this one if none is given."""
        rank = self.rank if rank is None else rank
        return ranks_data(rank, self.count if count is None else count, self.dtype, self.number)

    def reduced(self, count: int | None = None) -> np.ndarray:
        return over_ranks(self.op, self.size, self.count if count is None else count, self.dtype, self.number)

    @property
    def op_number(self):
        return getattr(roundel, self.op)


def allreduce(d: Draw) -> Step:
    x = d.data()
    out = x if d.in_place else None
    return Step("allreduce", (x, d.op_number, out), {"name": d.name}, d.reduced())


def allreduce_in_arena(d: Draw) -> Step:
    x = d.data()
    buffer = d.comm.allocate(max(1, x.nbytes))[: x.nbytes].view(x.dtype)
    buffer[:] = x
    return Step("allreduce", (buffer, d.op_number, buffer), {"name": d.name}, d.reduced())


def reduce_scatter(d: Draw) -> Step:
    rows = [d.count // d.size + (r < d.count % d.size) for r in range(d.size)]
    begin = sum(rows[: d.rank])
    return Step(
        "reduce_scatter", (d.data(), d.op_number), {"name": d.name}, d.reduced()[begin : begin + rows[d.rank]]
    )  # the first count % size ranks have one more


def reduce(d: Draw) -> Step:
    x = d.data()
    out = x if d.in_place and d.rank == d.root else None
    return Step("reduce", (x, d.root, d.op_number, out), {"name": d.name}, d.reduced() if d.rank == d.root else None)


def grouped_allreduce(d: Draw) -> Step:
    counts = [d.count, 0, d.count // 3, 1]
    xs = [d.data(count=count) for count in counts]
    expected = np.concatenate([d.reduced(count) for count in counts])
    return Step("grouped_allreduce", (xs, d.op_number, xs if d.in_place else None), {"name": d.name}, expected)


def uneven_reduce_scatter(d: Draw) -> Step:
    begin, total = sum(d.rows[: d.rank]), sum(d.rows)
    expected = d.reduced(total)[begin : begin + d.rows[d.rank]]
    return Step("reduce_scatter", (d.data(count=total), d.op_number), {"name": d.name, "rows": d.rows}, expected)


def gather(d: Draw) -> Step:
    expected = np.concatenate([d.data(r, n) for r, n in enumerate(d.rows)]) if d.rank == d.root else None
    return Step("gather", (d.data(count=d.rows[d.rank]), d.root, d.rows), {"name": d.name}, expected)


def scatter(d: Draw) -> Step:
    whole, begin = d.data(d.root, sum(d.rows)), sum(d.rows[: d.rank])
    x, out = (whole, None) if d.rank == d.root else (None, np.empty(d.rows[d.rank], whole.dtype))
    return Step("scatter", (x, d.root, d.rows, out), {"name": d.name}, whole[begin : begin + d.rows[d.rank]])


def allgather(d: Draw) -> Step:
    expected = np.concatenate([d.data(r, n) for r, n in enumerate(d.rows)])
    return Step("allgather", (d.data(count=d.rows[d.rank]), d.rows), {"name": d.name}, expected)


def broadcast(d: Draw) -> Step:
    return Step("broadcast", (d.data(), d.root), {"name": d.name}, d.data(d.root))


def alltoall(d: Draw) -> Step:
    each = d.count // d.size
    expected = np.concatenate([d.data(r, each * d.size)[each * d.rank : each * (d.rank + 1)] for r in range(d.size)])
    return Step("alltoall", (d.data(count=each * d.size),), {"name": d.name}, expected)


def uneven_alltoall(d: Draw) -> Step:
    sends = [[d.rows[(r + to) % d.size] for to in range(d.size)] for r in range(d.size)]  # from r to `to`
    received = [sends[r][d.rank] for r in range(d.size)]
    data = [d.data(r, sum(sends[r])) for r in range(d.size)]
    begin = [sum(sends[r][: d.rank]) for r in range(d.size)]
    expected = np.concatenate([data[r][begin[r] : begin[r] + received[r]] for r in range(d.size)])
    keywords = {"name": d.name, "splits": sends[d.rank]}
    if d.asynchronous:
        keywords["received_splits"] = received
    return Step("alltoall", (data[d.rank],), keywords, expected)


def barrier(d: Draw) -> Step:
    return Step("barrier", ())


def transfer(d: Draw) -> Step:
    """To the rank `shift` further on, from the one as far back. The receive is the step; the send goes beside it."""
    if d.size == 1:
        return barrier(d)
    source = (d.rank - d.shift) % d.size
    sending = d.comm.send_async(d.data(), (d.rank + d.shift) % d.size)
    return Step("recv", (np.empty_like(d.data()), source), {}, d.data(source), sending.wait)


def sendrecv(d: Draw) -> Step:
    if d.size == 1:
        return barrier(d)
    source, out = (d.rank - d.shift) % d.size, np.empty_like(d.data())
    return Step("sendrecv", (d.data(), (d.rank + d.shift) % d.size, out, source), {}, d.data(source))


KINDS = [allreduce, allreduce, allreduce_in_arena, grouped_allreduce, reduce, reduce_scatter, uneven_reduce_scatter]
KINDS += [allgather, gather, scatter, broadcast, alltoall, uneven_alltoall, barrier, transfer, sendrecv]


def run(comm, seed: int, calls: int) -> None:
    """Draw and run a program. Raises AssertionError naming the call whose result is wrong."""
    rng = random.Random(seed)
    pending: list[tuple[Step, object, str]] = []

    def finish(step: Step, result, what: str) -> None:
        try:
            if step.expected is not None:
                assert_equal_bits(np.concatenate(result) if isinstance(result, list) else result, step.expected)
            step.also()
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error

    for number in range(calls):
        kind = rng.choice(KINDS)
        d = Draw(rng, comm.rank, comm.size, number, comm)
        most_pending = rng.randrange(1, 12)
        step = kind(d)
        what = f"seed {seed}, call {number}: {kind.__name__} of {d.count} {d.dtype}, {d.op}, root {d.root}"
        if d.asynchronous:
            pending.append((step, getattr(comm, step.method + "_async")(*step.arguments, **step.keywords), what))
        else:
            finish(step, getattr(comm, step.method)(*step.arguments, **step.keywords), what)
        if len(pending) >= most_pending or number == calls - 1:
            rng.shuffle(pending)  # of waiting, not of running
            for waiting, handle, name in pending:
                finish(waiting, handle.wait(), name)
            pending.clear()
