"""A rank for the tests of faults: checked collectives of all kinds until something goes wrong, which it then tells in JSON.

    fault_rank.py <program> [seed, or what the program takes]

Programs: `mixed` (until an error), `some` (a few rounds, then it leaves), `late` (the last rank stays away), `idle` (waits for
orders on stdin, so that it is in no operation when something happens), `groups` (of which one rank has to leave because of
another's end), `groups_go_on` (after a trouble of the job). COMES_LATE_SECONDS and COMES_ON_ORDER in a rank's environment delay
its init().
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import roundel

COUNTS = (1, 20, 3000, 40_000, 200_000)  # a flag line, one shot, cells, several chunks


def tell(**what) -> None:
    print(json.dumps({"at": time.time(), **what}), flush=True)


def check(got: np.ndarray, expected: np.ndarray) -> None:
    """Small integers in every dtype: bits compare exactly."""
    if not np.array_equal(got, expected):
        tell(wrong=True, got=str(got[:8]), expected=str(expected[:8]))
        os._exit(1)


class Mixed:
    """One round after another, the same on every rank because the generator is."""

    def __init__(self, comm, seed: int) -> None:
        self.comm, self.random = comm, random.Random(seed)
        self.total = sum(range(1, comm.size + 1))
        self.arena = comm.allocate(1 << 20).view(np.float32)

    def allreduce(self, n: int) -> None:
        check(self.comm.allreduce(np.full(n, self.comm.rank + 1, np.float32), name=f"sum.{n}"), np.full(n, self.total))

    def arena_allreduce(self, n: int) -> None:
        x = self.arena[: max(n, 1000)]
        x[:] = self.comm.rank + 1
        check(self.comm.allreduce(x, out=x), np.full(len(x), self.total))

    def broadcast(self, n: int) -> None:
        root = self.random.randrange(self.comm.size)
        check(self.comm.broadcast(np.full(n, self.comm.rank, np.int32), root), np.full(n, root))

    def allgather(self, n: int) -> None:
        expected = np.repeat(np.arange(self.comm.size, dtype=np.int16), n)
        check(self.comm.allgather(np.full(n, self.comm.rank, np.int16)), expected)

    def reduce_scatter(self, n: int) -> None:
        mine = self.comm.reduce_scatter(np.full(n * self.comm.size, self.comm.rank + 1, np.int64))
        check(mine, np.full(n, self.total))

    def alltoall(self, n: int) -> None:
        x = np.repeat(np.arange(self.comm.size), n) + 10 * self.comm.rank
        check(self.comm.alltoall(x), np.repeat(10 * np.arange(self.comm.size), n) + self.comm.rank)

    def asynchronous(self, n: int) -> None:
        handles = [self.comm.allreduce_async(np.full(n, i, np.int32), name=f"async.{i}") for i in range(4)]
        for i, handle in enumerate(handles):
            check(handle.wait(), np.full(n, i * self.comm.size))

    def transfer(self, n: int) -> None:
        comm = self.comm
        got = np.empty(n, np.int32)
        handles = [
            comm.recv_async(got, (comm.rank - 1) % comm.size),
            comm.send_async(np.full(n, comm.rank, np.int32), (comm.rank + 1) % comm.size),
        ]
        for handle in handles:
            handle.wait()
        check(got, np.full(n, (comm.rank - 1) % comm.size))

    def round(self) -> None:
        kinds = [self.allreduce, self.arena_allreduce, self.broadcast, self.allgather, self.reduce_scatter]
        kinds += [self.alltoall, self.asynchronous, self.transfer]
        self.random.choice(kinds)(self.random.choice(COUNTS))

    def rounds(self) -> None:
        """All kinds at all sizes, once."""
        for n in COUNTS:
            for kind in (self.allreduce, self.arena_allreduce, self.broadcast, self.allgather, self.reduce_scatter):
                kind(n)
            self.alltoall(n)
            self.asynchronous(n)
            self.transfer(n)


def groups(comm, members: str, depth: str, call: str, victim: str) -> None:
    """The leaver waits for the victim in the job; all others for the leaver in a group, without any operation of the job.

    members: "inside" if the victim is in the group; depth: of the splits that make it; call: what is called there. For a call
    of "split" the leaver calls it too, and leaves by another thread.
    """
    victim, leaver = int(victim), 1

    def leave() -> None:
        with contextlib.suppress(roundel.PeerLostError):
            comm.recv(np.empty(1), victim)
        roundel.shutdown()

    group = comm.split(0 if members == "inside" or comm.rank != victim else None, key=-comm.rank)
    for _ in range(int(depth) - 1):
        group = group and group.split(0)  # the group between is dropped
    comm.barrier()
    tell(running=True)
    if comm.rank == victim:
        time.sleep(1000)
    if call == "split":
        if comm.rank == leaver:
            threading.Thread(target=leave).start()
        group.split(0)
    elif comm.rank == leaver:
        comm.recv(np.empty(1), victim)
    elif call == "recv":
        group.recv(np.empty(1), group.members.index(leaver))
    else:
        handles = [group.allreduce_async(np.ones(n)) for n in (10, 100_000)]
        for handle in reversed(handles):
            handle.wait()


def groups_go_on(comm, trouble: str) -> None:
    """A group without rank 3 outlives a "timeout" of rank 1 in the job, or the "loss" of rank 3; then rank 2 is killed."""
    group = comm.split(0 if comm.rank != 3 else None)
    comm.barrier()
    if comm.rank == 3:
        tell(running=True)
        if trouble == "loss":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    if trouble == "timeout" and comm.rank == 1:
        with contextlib.suppress(roundel.TimeoutError):
            comm.recv(np.empty(1), 0, timeout=0.1)
    with contextlib.suppress(roundel.RoundelError):
        comm.barrier()
    group.barrier()
    tell(running=True)
    if comm.rank == 2:
        time.sleep(1000)
    group.allreduce(np.ones(10))


def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    program, seed = sys.argv[1], int(sys.argv[2]) if sys.argv[2:3] and sys.argv[2].isdigit() else 0
    if not os.environ.get("ROUNDEL_FAILPOINT", "").split("=")[-1].startswith("segv"):
        faulthandler.enable()
    time.sleep(float(os.environ.get("COMES_LATE_SECONDS", "0")))
    if "COMES_ON_ORDER" in os.environ:
        sys.stdin.readline()
    try:
        roundel.init()
        comm = roundel.communicator()
        mixed = Mixed(comm, seed)
        if "fork" in sys.argv and comm.rank == comm.size - 1 and os.fork() == 0:
            time.sleep(20)  # a child that outlives its parent, as a DataLoader worker may
            os._exit(0)
        if program == "late":
            comm.barrier()
            tell(running=True)
            if comm.rank != comm.size - 1:
                comm.allreduce(np.ones(10, np.float32), name="layer.weight")
            else:
                time.sleep(float(os.environ["LATE_SECONDS"]))
                comm.barrier()
        elif program == "some":
            tell(running=True)
            mixed.rounds()
        elif program == "groups":
            groups(comm, *sys.argv[2:])
        elif program == "groups_go_on":
            groups_go_on(comm, *sys.argv[2:])
        elif program == "idle":
            comm.barrier()
            tell(running=True)
            sys.stdin.readline()
            while True:
                mixed.round()
        else:
            if seed:
                mixed.rounds()
            tell(running=True)
            while True:
                mixed.round() if seed else mixed.rounds()
        roundel.shutdown()
        tell(left=True)
    except roundel.RoundelError as e:
        tell(error=type(e).__name__, text=str(e), ranks=list(getattr(e, "ranks", ())), op=getattr(e, "op", ""))
        with contextlib.suppress(roundel.RoundelError):
            tell(after=[entry["state"] for entry in roundel.flight_record()][-3:])


if __name__ == "__main__":
    main()
