"""Timing: batches of back-to-back calls, all sizes and variants in turn, the slowest rank counts.

One repetition of a case: warm up, fill the buffers, meet at a barrier, time a batch of calls. A batch lasts about
BATCH_SECONDS or is one call. Repetitions go round-robin over all cases, so that noise of the machine hits all alike. Every
rank times its own batches; a repetition's time is the largest among the ranks.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import numpy as np
from roundel.ops import Max

from bench.collectives import CEILINGS, Case, Collective, Job
from bench.data import periodic

BATCH_SECONDS = 1e-3  # thousands of ticks of the clock, and of the size of a scheduler's slice
RUN_SECONDS = 10.0  # of all repetitions, where -n does not say how many
REPETITIONS = (7, 100)  # fewer have no tenth percentile worth the name; more do not change the median
MOST_CALLS = 1 << 16


class WrongResult(Exception):
    """A collective's result is not what it must be; the text names rank, size and the first bad index."""


@dataclass
class Timing:
    case: Case
    calls: int  # in a batch
    seconds: np.ndarray  # of one call, by repetition


def make_cases(row: Collective, job: Job, counts: list[int], variants: list[str]) -> list[Case]:
    """Cases by size, each size with its ceilings. All share buffers as large as the largest size."""
    most, storage = max(counts), job.dtype.storage
    numbers = periodic(job.dtype.encode(job.numbers.tables[job.rank]), most)
    private = (numbers, np.zeros(most, storage))
    buffers = {"private": private}
    if "arena" in variants:
        results = job.comm.allocate(most * storage.itemsize).view(storage)
        x = numbers
        if "arena" not in row.in_place:
            x = job.comm.allocate(most * storage.itemsize).view(storage)
            np.copyto(x, numbers)
        buffers["arena"] = (x, results)
    cases = []
    for count in counts:
        mine = [Case(row, job, count, variant, buffers[variant]) for variant in variants]
        cases += [Case(CEILINGS[name], job, count, name, private) for name in sorted({case.ceiling for case in mine})]
        cases += mine
    return cases


def measure(job: Job, cases: list[Case], repetitions: int | None, warmup: int) -> list[Timing]:
    """Verify and time all cases. The timings are the same on every rank. Raises WrongResult on every rank."""
    gc.collect()
    gc.disable()
    try:
        for case in cases:
            case.fill()
            job.comm.barrier()
            case.run()
            verify(case, 1)
        calls = [calls_in_batch(case) for case in cases]
        if repetitions is None:
            repetitions = repetitions_in_time(job, cases, calls, warmup)
        seconds = np.zeros((repetitions, len(cases)))
        for i in range(repetitions):
            for j, case in enumerate(cases):
                seconds[i, j] = repetition(case, calls[j], warmup, check=i == repetitions - 1)
    finally:
        gc.enable()
    seconds = job.comm.allreduce(seconds, Max)
    return [Timing(case, calls[j], seconds[:, j]) for j, case in enumerate(cases)]


def repetition(case: Case, calls: int, warmup: int = 1, check: bool = False) -> float:
    """Seconds that one of `calls` calls took on this rank. check: the last result."""
    run, barrier, clock = case.run, case.job.comm.barrier, time.perf_counter_ns
    for _ in range(warmup):
        run()
    nanoseconds, left, now = 0, calls, 0
    while left > 0:
        now = min(left, case.most_calls)  # a sum in place is filled anew before it outgrows its dtype
        case.fill()
        barrier()
        start = clock()
        for _ in range(now):
            run()
        nanoseconds += clock() - start
        left -= now
    if check:
        verify(case, now)
    return nanoseconds * 1e-9 / calls


def verify(case: Case, calls: int) -> None:
    """All ranks raise WrongResult when one has a wrong result; only those that have it say what is wrong."""
    wrong = case.check(calls)
    if agreed(case.job, wrong is not None) > 0:
        raise WrongResult(wrong or "")


def calls_in_batch(case: Case) -> int:
    """The smallest power of two that lasts BATCH_SECONDS."""
    calls = 1
    while calls < MOST_CALLS and agreed(case.job, calls * repetition(case, calls)) < BATCH_SECONDS:
        calls *= 2
    return calls


def repetitions_in_time(job: Job, cases: list[Case], calls: list[int], warmup: int) -> int:
    """How often all cases fit into RUN_SECONDS."""
    start = time.perf_counter()
    for case, batch in zip(cases, calls, strict=True):
        repetition(case, batch, warmup)
    fits = RUN_SECONDS / agreed(job, time.perf_counter() - start)
    return int(min(max(fits, REPETITIONS[0]), REPETITIONS[1]))


def agreed(job: Job, value: float) -> float:
    """The largest among the ranks."""
    return float(job.comm.allreduce(np.array([value], np.float64), Max)[0])
