"""TCP between real ranks: several sockets for each pair, and messages that nobody receives in time."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import roundel
from reference import assert_equal_bits, over_ranks, ranks_data
from team import Team


@pytest.fixture(scope="module")
def striped():
    with Team(3, "tcp", {"ROUNDEL_TCP_SOCKETS": "4"}) as team:
        yield team


@pytest.fixture(scope="module")
def two_hosts():
    with Team(4, "hosts") as team:  # 0 and 2 share memory, 1 and 3 too
        yield team


def collectives_of_all_sizes(comm):
    for count in (2, 1000, 20_000, 300_000, 2_000_000):  # 8 bytes to 8 MB
        x = ranks_data(comm.rank, count, "float32")
        assert_equal_bits(comm.allreduce(ranks_data(comm.rank, count, "int32")), over_ranks("Sum", comm.size, count, "int32"))
        assert_equal_bits(comm.allgather(x), np.concatenate([ranks_data(r, count, "float32") for r in range(comm.size)]))
        comm.broadcast(x, 1)
        assert_equal_bits(x, ranks_data(1, count, "float32"))


def both_directions_at_the_same_time(comm):
    count = 5_000_000
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x = {peer: ranks_data(comm.rank + peer, count, "uint8") for peer in (following, preceding)}
    y = {peer: np.empty(count, np.uint8) for peer in x}
    pending = [comm.send_async(x[peer], peer) for peer in x] + [comm.recv_async(y[peer], peer) for peer in y]
    for handle in pending:
        handle.wait()
    for peer in y:
        assert_equal_bits(y[peer], ranks_data(comm.rank + peer, count, "uint8"))


def much_that_nobody_expects(comm):
    count, messages = 1_000_000, 80
    if comm.rank == 0:
        pending = [comm.send_async(np.full(count, i, np.uint8), 1) for i in range(messages)]
    for _ in range(3):  # comes through meanwhile
        assert comm.allreduce(np.ones(10))[0] == comm.size
    if comm.rank == 0:
        for handle in pending:
            handle.wait()
    elif comm.rank == 1:
        y = np.empty(count, np.uint8)
        for i in range(messages):
            comm.recv(y, 0)
            assert (y == i).all()


def many_tiny_messages(comm):
    y = np.empty(1, np.int64)
    for i in range(5000):
        if comm.rank == 0:
            comm.send(np.array([i]), 1)
        elif comm.rank == 1:
            comm.recv(y, 0)
            assert y[0] == i
    comm.barrier()


def names_of_any_script(comm):
    for start in ("", "x", "xx"):
        name = start + "\u91cd\u307f" * 20  # far longer than the recorder keeps
        comm.allreduce(np.ones(1), name=name)
        kept = roundel.flight_record()[-1]["name"]
        assert name.startswith(kept) and len(kept.encode()) > 44


STRIPED = [
    names_of_any_script,
    collectives_of_all_sizes,
    both_directions_at_the_same_time,
    much_that_nobody_expects,
    many_tiny_messages,
]


@pytest.mark.parametrize("case", [case.__name__ for case in STRIPED])
def test_over_four_sockets(striped, case):
    striped.run("test_tcp", case, {})


def one_way_messages_between_barriers(comm, peer, count, messages):
    """Sent before a barrier, received after it: what was received never counts against the sender."""
    x, y = np.zeros(count, np.uint8), np.empty(count, np.uint8)
    for i in range(messages):
        if comm.rank == 0:
            x[:] = i % 251
            comm.send(x, peer)
        comm.barrier()
        if comm.rank == peer:
            comm.recv(y, 0)
            assert (y == i % 251).all()


@pytest.mark.parametrize("peer", [1, 2])  # over TCP, and through shared memory
@pytest.mark.parametrize(("count", "messages"), [(1000, 1000), (100_000, 300)])
def test_one_way_messages_between_barriers(two_hosts, peer, count, messages):
    two_hosts.run("test_tcp", "one_way_messages_between_barriers", {"peer": peer, "count": count, "messages": messages})


def test_one_way_messages_between_barriers_of_shared_memory():
    with Team(2, "shm") as team:
        team.run("test_tcp", "one_way_messages_between_barriers", {"peer": 1, "count": 100_000, "messages": 300})


def a_sum(comm):
    assert_equal_bits(comm.allreduce(ranks_data(comm.rank, 1000, "int32")), over_ranks("Sum", comm.size, 1000, "int32"))


def test_a_job_over_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
            port = s.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with Team(3, "tcp", {"ROUNDEL_RENDEZVOUS": f"[::1]:{port}"}) as team:
        team.run("test_tcp", "a_sum", {})
