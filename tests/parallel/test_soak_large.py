"""More elements than 2^31, and more bytes than 2^32: every collective at two ranks, over shared memory and TCP; `make soak`.

Arrays are filled and checked in blocks; what both ranks hold at a time is at most 8.6 GB.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import team as teams

N = 2**31 + 5
PERIOD = 251  # prime: no two places that are a power of two apart hold the same
BLOCK = PERIOD << 16
ROOM = 14e9  # bytes of memory that must be free; the arrays, what the library keeps, and two interpreters

WAYS = {"shm": ("shm", {}), "shm by cells": ("shm", {"ROUNDEL_SINGLE_COPY": "0"}), "tcp": ("tcp", {})}
CASES = [
    ("allreduce", "int8", "private"),
    ("allreduce", "int8", "arena"),
    ("allreduce", "bool", "private"),
    ("allreduce", "int16", "private"),  # more than 2^32 bytes
    ("broadcast", "int8", "private"),
    ("broadcast", "bool", "arena"),
    ("allgather", "int8", "private"),
    ("allgather", "bool", "arena"),
    ("reduce_scatter", "int8", "private"),
    ("reduce_scatter", "int8", "arena"),
    ("alltoall", "int8", "private"),
    ("alltoall", "bool", "arena"),
    ("transfer", "int8", "private"),
    ("transfer", "int8", "arena"),
]

# -- on a rank, by worker.py


def pattern(salt: int, dtype: str) -> np.ndarray:
    """A block of what a rank's array repeats: sums of two fit every dtype."""
    values = (np.arange(BLOCK, dtype=np.int64) + salt * 17) % PERIOD % 50
    return (values % 2 == 1) if dtype == "bool" else values.astype(dtype)


def blocks(count: int) -> list[slice]:
    return [slice(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)]


def array(comm, count: int, dtype: str, where: str) -> np.ndarray:
    itemsize = np.dtype(dtype).itemsize
    return comm.allocate(count * itemsize).view(dtype) if where == "arena" else np.empty(count, dtype)


def filled(comm, count: int, dtype: str, where: str, salt: int) -> np.ndarray:
    x, block = array(comm, count, dtype, where), pattern(salt, dtype)
    for at in blocks(count):
        x[at] = block[: at.stop - at.start]
    return x


def check(x: np.ndarray, block: np.ndarray, begin: int = 0) -> None:
    """begin: the place in the pattern where x begins."""
    block = np.roll(block, -(begin % PERIOD))
    for at in blocks(len(x)):
        if not np.array_equal(x[at], block[: at.stop - at.start]):
            wrong = np.flatnonzero(x[at] != block[: at.stop - at.start])
            raise AssertionError(f"{len(wrong)} wrong in [{at.start}, {at.stop}), the first at {at.start + wrong[0]}")


def reduced(dtype: str) -> np.ndarray:
    return (pattern(0, dtype) | pattern(1, dtype)) if dtype == "bool" else pattern(0, dtype) + pattern(1, dtype)


def allreduce(comm, dtype: str, where: str) -> None:
    x = filled(comm, N, dtype, where, comm.rank)
    comm.allreduce(x, out=x)
    check(x, reduced(dtype))


def broadcast(comm, dtype: str, where: str) -> None:
    x = filled(comm, N, dtype, where, comm.rank)
    comm.broadcast(x, 1)
    check(x, pattern(1, dtype))


def allgather(comm, dtype: str, where: str) -> None:
    rows = [N, 3]
    out = array(comm, sum(rows), dtype, where)
    comm.allgather(filled(comm, rows[comm.rank], dtype, "private", comm.rank), rows, out)
    check(out[:N], pattern(0, dtype))
    check(out[N:], pattern(1, dtype))


def reduce_scatter(comm, dtype: str, where: str) -> None:
    rows = [3, N]
    out = array(comm, rows[comm.rank], dtype, where)
    comm.reduce_scatter(filled(comm, sum(rows), dtype, where, comm.rank), out=out, rows=rows)
    check(out, reduced(dtype), begin=3 * comm.rank)


def alltoall(comm, dtype: str, where: str) -> None:
    splits = [[1, N], [2, 4]]  # from rank 0, from rank 1
    received = [splits[0][comm.rank], splits[1][comm.rank]]
    x, out = filled(comm, sum(splits[comm.rank]), dtype, where, comm.rank), array(comm, sum(received), dtype, where)
    comm.alltoall(x, out, splits=splits[comm.rank], received_splits=received)
    check(out[: received[0]], pattern(0, dtype), begin=comm.rank)
    check(out[received[0] :], pattern(1, dtype), begin=2 * comm.rank)


def transfer(comm, dtype: str, where: str) -> None:
    if comm.rank == 0:
        comm.send(filled(comm, N, dtype, where, 0), 1)
    else:
        x = array(comm, N, dtype, where)
        comm.recv(x, 0)
        check(x, pattern(0, dtype))


def run(comm, kind: str, dtype: str, where: str) -> None:
    globals()[kind](comm, dtype, where)
    comm.barrier()
    print(
        f"rank {comm.rank}: {kind} of {dtype}, {where}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB at most"
    )


# -- in the test's process


def free_memory() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.fixture(scope="module", params=WAYS)
def team(request):
    transport, env = WAYS[request.param]
    with pytest.MonkeyPatch.context() as patch, teams.Team(2, transport, env | {"ROUNDEL_TIMEOUT": "300"}) as made:
        patch.setattr(teams, "WATCHDOG_SECONDS", 400)  # where memory is slow to come
        yield made


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "dtype", "where"), CASES)
def test_more_than_2_31_elements(team, kind, dtype, where):
    if (free := free_memory()) < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:g} GB of free memory, {free / 1e9:.1f} are free")
    team.run("test_soak_large", "run", {"kind": kind, "dtype": dtype, "where": where})
