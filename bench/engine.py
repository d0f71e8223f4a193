"""`python -m bench.engine -np 2`: what names and fusion cost, beside the communicator's own figures in the same run.

Every case is timed in turn with the others, several times; the medians of rank 0 are printed, and their differences.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import roundel
from roundel.launch import run as roundelrun
from roundel.launch.variables import OURS
from roundel.world import engine

from bench.report import machine

LAUNCHERS = (*OURS, "RANK")
SUM = int(roundel.Sum)


def named_8_bytes(comm) -> dict[str, Callable[[], object]]:
    """One named asynchronous all-reduce of 8 bytes, waited for."""
    x = np.ones(2, np.float32)
    cases = {
        "communicator": lambda: comm.allreduce(x, SUM, x),
        "engine": lambda: engine().allreduce_in_place(x, SUM, 1.0, 1.0, "x").wait(),
    }
    if torch_layer() is not None:
        hvd, torch = torch_layer()
        t = torch.ones(2)
        cases["roundel.torch"] = lambda: hvd.synchronize(hvd.allreduce_async_(t, name="t", op=hvd.Sum))
    return cases


def many(comm, tensors: int, elements: int) -> dict[str, Callable[[], object]]:
    """Many tensors submitted at once, then waited for; and one all-reduce of as many bytes, packed and unpacked by numpy."""
    xs = [np.ones(elements, np.float32) for _ in range(tensors)]
    names = [f"{elements}.{i}" for i in range(tensors)]
    buffer = comm.empty(tensors * elements)

    def packed() -> None:
        np.concatenate(xs, out=buffer)
        comm.allreduce(buffer, SUM, buffer)
        for i, x in enumerate(xs):
            x[:] = buffer[i * elements : (i + 1) * elements]

    def submitted() -> None:
        start = engine().allreduce_in_place
        for handle in [start(x, SUM, 1.0, 1.0, name) for x, name in zip(xs, names, strict=True)]:
            handle.wait()

    cases = {
        "communicator, one buffer, packed": packed,
        "communicator, one by one": lambda: [comm.allreduce(x, SUM, x) for x in xs],
        "engine": submitted,
        "engine, one group": lambda: engine().allreduce(xs, xs, SUM, name=f"group of {tensors}").wait(),
    }
    if torch_layer() is not None:
        hvd, torch = torch_layer()
        ts = [torch.ones(elements) for _ in range(tensors)]
        torch_names = [f"torch {name}" for name in names]

        def torch_submitted() -> None:
            handles = [hvd.allreduce_async_(t, name=n, op=hvd.Sum) for t, n in zip(ts, torch_names, strict=True)]
            for handle in handles:
                hvd.synchronize(handle)

        cases["roundel.torch"] = torch_submitted
        cases["roundel.torch, one group"] = lambda: hvd.grouped_allreduce_(ts, name=f"torch group of {tensors}", op=hvd.Sum)
    return cases


def torch_layer():
    """(roundel.torch, torch), or None where there is no torch."""
    try:
        import roundel.torch as hvd
        import torch
    except ModuleNotFoundError:
        return None
    return hvd, torch


def measure(comm, cases: dict[str, Callable[[], object]], repetitions: int, calls: int) -> dict[str, float]:
    """Median microseconds of one call of each case, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, call in cases.items():
            comm.barrier()
            call()
            for _ in range(calls):
                begin = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("-np", dest="ranks", metavar="N", type=int, help="start N ranks under roundelrun")
    parser.add_argument("-n", dest="repetitions", metavar="N", type=int, default=15, help="repetitions (default 15)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    if options.ranks is not None and not any(name in os.environ for name in LAUNCHERS):
        return roundelrun.main(["-np", str(options.ranks), "--no-prefix", "--", sys.executable, "-m", "bench.engine", *argv])
    roundel.init()
    comm = roundel.communicator()
    groups = {
        "an all-reduce of 8 bytes": (named_8_bytes(comm), 200),
        "100 tensors of 16 KB": (many(comm, 100, 4096), 10),
        "1,000 tensors of 4 KB": (many(comm, 1000, 1024), 10),
    }
    figures = {title: measure(comm, cases, options.repetitions, calls) for title, (cases, calls) in groups.items()}
    if comm.rank != 0:
        return 0
    for title, medians in figures.items():
        print(f"{title}, {comm.size} ranks, {comm.transport}")
        base = next(iter(medians.values()))
        for name, us in medians.items():
            print(f"  {name:34}{us:10.1f} us{us - base:+10.1f}{us / base:8.2f} x")
    if options.json:
        record = {
            "schema": 2,
            "benchmark": "engine",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "ranks": comm.size,
            "transport": comm.transport,
            "microseconds": figures,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
