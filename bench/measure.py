"""Timing: batches of back-to-back calls, all sizes and variants in turn, the slowest rank counts.

One repetition of a case: warm up, fill the buffers, meet at a barrier, time a batch of calls. A batch lasts about
BATCH_SECONDS or is one call. Repetitions go round-robin over all cases, so that noise of the machine hits all alike. Every
rank times its own batches; a repetition's time is the largest among the ranks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from roundel.ops import Max

from bench import peers
from bench.case import Case
from bench.collectives import CEILINGS, Collective, Job
from bench.data import periodic

BATCH_SECONDS = 1e-3  # thousands of ticks of the clock, and of the size of a scheduler's slice
RUN_SECONDS = 10.0  # of all repetitions, and as much again for each peer, where -n does not say how many
REPETITIONS = (7, 100)  # fewer have no tenth percentile worth the name; more do not change the median
LONGEST_SECONDS = 60.0  # libraries whose ranks do not give way take long with more ranks than cores:
FEWEST = 3  # then fewer must do,
SLOW_SECONDS = 0.5  # and calls of a peer that take longer than this are not timed
MOST_CALLS = 1 << 16


AnyCase = Case | peers.PeerCase


class WrongResult(Exception):
    """A collective's result is not what it must be; the text names rank, size and the first bad index."""


@dataclass
class Timing:
    case: AnyCase
    calls: int  # in a batch
    seconds: np.ndarray  # of one call, by repetition


def make_cases(
    row: Collective,
    job: Job,
    counts: list[int],
    variants: list[str],
    teams: Sequence[peers.Team] = (),
    link: Collective | None = None,
) -> list[AnyCase]:
    """Cases by size, each size with its ceilings and peers. Ours share buffers as large as the largest size.

    link: the ceiling between hosts, which then all are compared with.
    """
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
        mine += peers.cases(teams, count, variants)
        ceilings = {"copy": CEILINGS["copy"]}
        for case in mine:
            case.ceiling = case.ceiling if link is None else link.name
            ceilings[case.ceiling] = link or CEILINGS[case.ceiling]
        cases += [Case(ceilings[name], job, count, name, private) for name in sorted(ceilings)]
        cases += mine
    return cases


def measure(job: Job, cases: list[AnyCase], repetitions: int | None, warmup: int) -> list[Timing]:
    """Verify and time all cases. The timings are the same on every rank. Raises WrongResult on every rank."""
    gc.collect()
    gc.disable()
    try:
        cases = verified(job, cases)
        calls = [calls_in_batch(job, case) for case in cases]
        if repetitions is None:
            repetitions = repetitions_in_time(job, cases, calls, warmup)
        seconds = np.zeros((repetitions, len(cases)))
        for i in range(repetitions):
            for j, case in enumerate(cases):
                seconds[i, j] = repetition(job, case, calls[j], warmup, check=i == repetitions - 1)
    finally:
        gc.enable()
    seconds = job.comm.allreduce(seconds, Max)
    return [Timing(case, calls[j], seconds[:, j]) for j, case in enumerate(cases)]


def verified(job: Job, cases: list[AnyCase]) -> list[AnyCase]:
    """Those that are right, without those of peers that are too slow to wait for: larger sizes are not even tried then."""
    kept, slow = [], set()
    for case in cases:
        if (case.peer, case.variant) in slow:
            continue
        took = agreed(job, repetition(job, case, 1, warmup=0, check=True))
        if case.peer is not None and took > SLOW_SECONDS:
            took = agreed(job, repetition(job, case, 1, warmup=0))  # once may have been the machine
        if case.peer is not None and took > SLOW_SECONDS:
            slow.add((case.peer, case.variant))
            case.team.note = f"not timed from {case.bytes} bytes on, where a call takes {took:.1f} s"
        else:
            kept.append(case)
    return kept


def repetition(job: Job, case: AnyCase, calls: int, warmup: int = 1, check: bool = False) -> float:
    """Seconds that one of `calls` calls took on this rank. check: the last result; every rank raises WrongResult when one
    rank's is wrong, and only those say what is."""
    seconds, wrong = case.batch(calls, warmup, check)
    if check and agreed(job, wrong is not None) > 0:
        raise WrongResult(wrong or "")
    return seconds


def calls_in_batch(job: Job, case: AnyCase) -> int:
    """The smallest power of two that lasts BATCH_SECONDS."""
    calls = 1
    while calls < MOST_CALLS and agreed(job, calls * repetition(job, case, calls)) < BATCH_SECONDS:
        calls *= 2
    return calls


def repetitions_in_time(job: Job, cases: list[AnyCase], calls: list[int], warmup: int) -> int:
    """How often all cases fit into RUN_SECONDS for each library."""
    start = time.perf_counter()
    for case, batch in zip(cases, calls, strict=True):
        repetition(job, case, batch, warmup)
    once = agreed(job, time.perf_counter() - start)
    few, many = REPETITIONS
    wanted = RUN_SECONDS * len({case.peer for case in cases}) / once
    return int(max(min(max(wanted, few), many, LONGEST_SECONDS / once), FEWEST))


def agreed(job: Job, value: float) -> float:
    """The largest among the ranks."""
    return float(job.comm.allreduce(np.array([value], np.float64), Max)[0])
