"""One collective at one size on one kind of buffer: its buffers, a batch of timed calls, the check of what came out."""

from __future__ import annotations

import time

import numpy as np

from bench.collectives import CEILING_NAMES, Collective, Job, Run
from bench.data import OPS, POISON, UNLIMITED, first_bad


class Case:
    """What measure() times, in this process. bench/peers.py has one for other libraries' processes, with the same methods.

    variant: "private" (ordinary memory), "arena" (allocated by the library), or the name of a ceiling; of a peer's rank,
    "private" or "in_place".
    ceiling: the name of the one that it is compared with.
    most_calls: how many calls may follow a fill() and still be checked.
    """

    peer = None  # it is ours

    def __init__(self, row: Collective, job: Job, count: int, variant: str, buffers: tuple[np.ndarray, np.ndarray]) -> None:
        """buffers: this rank's numbers (not written to) and room for results, at least `count` elements each."""
        self.row, self.job, self.count, self.variant = row, job, count, variant
        self.bytes = count * job.dtype.storage.itemsize
        self.x, self.out = buffers[0][: row.brings(count, job.size)], buffers[1][: row.gets(count, job.size)]
        self.in_place = variant in row.in_place
        self.ceiling = "update" if self.in_place and row.reduces else "copy"  # the others read or write a buffer, not both
        self.most_calls = job.numbers.most_calls if row.reduces and self.in_place else UNLIMITED
        argument = (lambda array: array) if row.name in CEILING_NAMES else job.dtype.argument
        out = argument(self.out)
        self._run: Run = row.call(job.comm, out if self.in_place else argument(self.x), out, OPS[job.op])

    def batch(self, calls: int, warmup: int = 1, check: bool = False) -> tuple[float, str | None]:
        """Seconds that one of `calls` calls took on this rank, and, with `check`, what is wrong with the last result."""
        run, barrier, clock = self._run, self.job.comm.barrier, time.perf_counter_ns
        for _ in range(warmup):
            run()
        nanoseconds, left, now = 0, calls, 0
        while left > 0:
            now = min(left, self.most_calls)  # a sum in place is filled anew before it outgrows its dtype
            self.fill()
            barrier()
            start = clock()
            for _ in range(now):
                run()
            nanoseconds += clock() - start
            left -= now
        return nanoseconds * 1e-9 / calls, self.check(now) if check else None

    def fill(self) -> None:
        """Inputs as they were, results unwritten."""
        if self.in_place and self.row.has_input(self.job.rank):
            np.copyto(self.out, self.x)
        else:
            self.out.view(np.uint8).fill(POISON)

    def check(self, calls: int) -> str | None:
        """What is wrong with the result of the `calls`-th call since fill(); None when it is right."""
        begin, tolerance = 0, self.job.numbers.tolerance(calls)
        for table, start, count in self.row.expected(self.job, self.count, calls if self.in_place else 1):
            part = self.out[begin : begin + count]
            bad = first_bad(part, table, start, self.job.dtype, tolerance)
            if bad is not None:
                got, wanted = self.job.dtype.decode(part[bad : bad + 1])[0], table[(start + bad) % len(table)]
                what = f"{self.row.name} of {self.bytes} bytes ({self.variant})"
                return f"rank {self.job.rank}: {what}: wrong result: element {begin + bad} is {got}, expected {wanted}"
            begin += count
        return None
