"""Random programs of named requests, whose order differs between ranks and threads, against arithmetic.

A slice in every run, 10,000 programs with `make soak`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from programs import Draw
from reference import assert_equal_bits
from roundel.world import engine
from team import Team

TEAMS = [("shm", 2), ("tcp", 2), ("shm", 4), ("hosts", 4)]
SOAK = [
    ("shm", 2),
    ("shm", 3),
    ("shm", 4),
    ("shm", 8),
    ("tcp", 2),
    ("tcp", 3),
    ("tcp", 4),
    ("hosts", 4),
    ("hosts", 3),
    ("hosts", 7),
]
PROGRAMS, ROUNDS = 50, 20  # a round is under the watchdog; 10 teams x 20 x 50 = 10,000

# A started request, and what its result must be.
Started = tuple[object, Callable[[object], None]]


def expects(*arrays: np.ndarray) -> Callable[[object], None]:
    def check(result: object) -> None:
        for got, expected in zip(result, arrays, strict=True):
            assert_equal_bits(got, expected)

    return check


def allreduce(d: Draw, name: str) -> Started:
    x = d.data()
    return engine().allreduce([x], [x] if d.in_place else None, d.op_number, name=name), expects(d.reduced())


def group(d: Draw, name: str) -> Started:
    counts = [d.count, 0, d.count // 3, 1]
    xs = [d.data(count=count) for count in counts]
    handle = engine().allreduce(xs, xs if d.in_place else None, d.op_number, name=name)
    return handle, expects(*[d.reduced(count) for count in counts])


def allgather(d: Draw, name: str) -> Started:
    expected = np.concatenate([d.data(r, n) for r, n in enumerate(d.rows)])
    return engine().allgather([d.data(count=d.rows[d.rank])], name=name), expects(expected)


def broadcast(d: Draw, name: str) -> Started:
    handle = engine().broadcast(d.data(), d.root, name=name)
    return handle, lambda result: assert_equal_bits(result, d.data(d.root))


def alltoall(d: Draw, name: str) -> Started:
    def splits(rank: int) -> list[int]:  # to each rank
        return [(d.rows[rank] + r) % 50 for r in range(d.size)]

    def part(rank: int) -> np.ndarray:  # of another rank's array, what is for this one
        mine = splits(rank)
        return d.data(rank, sum(mine))[sum(mine[: d.rank]) : sum(mine[: d.rank + 1])]

    def check(result: object) -> None:
        got, received = result
        assert received == [splits(r)[d.rank] for r in range(d.size)]
        assert_equal_bits(got, np.concatenate([part(r) for r in range(d.size)]))

    return engine().alltoall(d.data(count=sum(splits(d.rank))), splits(d.rank), name=name), check


def reduce_scatter(d: Draw, name: str) -> Started:
    rows = [d.count // d.size + (r < d.count % d.size) for r in range(d.size)]
    begin = sum(rows[: d.rank])
    handle = engine().reduce_scatter([d.data()], d.op_number, name=name)
    return handle, expects(d.reduced()[begin : begin + rows[d.rank]])


def barrier(_: Draw, name: str) -> Started:
    return engine().barrier(), lambda result: None


KINDS = [allreduce, allreduce, allreduce, group, allgather, broadcast, alltoall, reduce_scatter, barrier]


def run_program(comm, seed: int) -> None:
    """Up to 40 requests from up to 3 threads, each rank in an order of its own."""
    rng = random.Random(seed)
    own = random.Random(1000 * seed + comm.rank)
    draws = [Draw(rng, comm.rank, comm.size, i, comm) for i in range(rng.randrange(1, 41))]
    kinds = [rng.choice(KINDS) for _ in draws]
    shares = [list(range(len(draws)))[t::3] for t in range(3)] if rng.random() < 0.5 else [list(range(len(draws)))]
    errors: list[BaseException] = []

    def work(share: list[int]) -> None:
        try:
            own.shuffle(share)
            started = [kinds[i](draws[i], f"request {i % 30}.{i // 30}") for i in share]
            own.shuffle(started)
            for handle, check in started:
                check(handle.wait())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares[1:]]
    for thread in threads:
        thread.start()
    work(shares[0])
    for thread in threads:
        thread.join()
    if errors:
        raise AssertionError(f"program {seed}") from errors[0]


def test_random_programs(comm):
    for seed in range(25):
        run_program(comm, seed)


def run_round(comm, seed: int) -> None:
    """On a rank, by worker.py."""
    for i in range(PROGRAMS):
        run_program(comm, seed + i)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "size"), SOAK)
def test_ten_thousand_random_programs(transport, size):
    with Team(size, transport) as team:
        for number in range(ROUNDS):
            team.run("test_engine_programs", "run_round", {"seed": 100_000 * size + PROGRAMS * number})
