"""What a rank of a peer runs: join the others through its own library, then time what our rank of the same number asks for.

    python -m bench.peer_rank CALLS DIRECTORY NAME CONFIG

CALLS is a module such as bench.calls_mpi: its Library joins (rank, size, barrier, finish), says what it is and makes calls.
The requests and answers are JSON, one to a packet; the first answer, hello, comes unasked:

    hello    {"forms": [those it can do], "lacks": why there are none, "library": version, "cores": it may use,
              "scheduler": its policy, "pid": its own}
    request  {"form", "count", "calls", "warmup", "check"}
    answer   {"seconds": of one call, "wrong": what is wrong with the result, or null} or {"error": text}
    request  {"end": true}; no answer
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import select
import socket
import sys
import threading

import numpy as np

from bench.case import Case
from bench.collectives import COLLECTIVES, Job
from bench.data import DTYPES, periodic

SCHEDULERS = {getattr(os, name): name for name in ("SCHED_OTHER", "SCHED_RR", "SCHED_FIFO", "SCHED_BATCH", "SCHED_IDLE")}


def main(argv: list[str]) -> int:
    calls, directory, name, config = argv
    library = importlib.import_module(calls).Library(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(os.path.join(directory, f"{name}.{library.rank}"))
        threading.Thread(target=end_with, args=(control,), daemon=True).start()
        serve(library, control, **json.loads(config))
        library.finish()
    return 0


def end_with(control: socket.socket) -> None:
    """Ends this process when the other end closes, also from within a call that waits for a rank that is gone."""
    poll = select.poll()
    poll.register(control, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


def serve(library, control: socket.socket, collective: str, dtype: str, op: str, most: int) -> None:
    """Answer requests until {"end": true}."""
    job = Job(library, DTYPES[dtype], op)
    forms = library.forms(collective)
    row = COLLECTIVES[collective]
    row = dataclasses.replace(row, call=library.call(collective), in_place=("in_place", *row.in_place))
    most = max(most, job.size)
    numbers = periodic(job.dtype.encode(job.numbers.tables[job.rank]), most)
    buffers = (numbers, np.zeros(most, job.dtype.storage))

    def answer(**what) -> None:
        control.send(json.dumps(what).encode())

    lacks = ""
    try:
        for form in forms:
            Case(row, job, job.size, form, buffers).batch(1, warmup=0)
    except Exception as error:
        forms, lacks = (), f"{type(error).__name__}: {error}".splitlines()[0]
    scheduler = next(
        (name for name in ("SCHED_RR", "SCHED_FIFO") if os.sched_getscheduler(0) == getattr(os, name)), "SCHED_OTHER"
    )
    where = {"cores": len(os.sched_getaffinity(0)), "scheduler": scheduler, "pid": os.getpid()}
    answer(forms=forms, lacks=lacks, library=library.version(), **where)
    cases: dict[tuple[str, int], Case] = {}
    gc.collect()
    gc.disable()
    while True:
        request = json.loads(control.recv(1 << 16) or b'{"end": true}')
        if "end" in request:
            return
        key = (request["form"], request["count"])
        try:
            if key not in cases:
                cases[key] = Case(row, job, key[1], key[0], buffers)
            seconds, wrong = cases[key].batch(request["calls"], request["warmup"], request["check"])
            library.barrier()  # all have finished, and sleep, before ours go on
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
        else:
            answer(seconds=seconds, wrong=wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
