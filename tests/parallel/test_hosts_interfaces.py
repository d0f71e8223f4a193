"""Hosts with two interfaces: ranks listen at the chosen one only, their bytes take it, and a choice that cannot be is named."""

from __future__ import annotations

import time

import pytest
from test_hosts import PORT, Job, listening, make_lab, rank_program, watchdog  # noqa: F401

PLACES = [0, 0, 1, 1]


@pytest.fixture
def lab():
    with make_lab(2, networks=2) as made:
        yield made


def wait_listening(lab, expected: list[int]) -> list[list[str]]:
    """The sockets that listen on each host, once there are as many as expected."""
    deadline, sockets = time.monotonic() + 20, []
    while [len(some) for some in sockets] != expected:
        assert time.monotonic() < deadline, sockets
        sockets = [listening(lab, host) for host in (0, 1)]
    return sockets


@pytest.mark.parametrize("rendezvous", ["wildcard", "the other network"])
@pytest.mark.parametrize("by", ["name", "address"])
def test_ranks_listen_at_the_chosen_interface_only_and_their_bytes_take_it(lab, tmp_path, rendezvous, by):
    with Job(lab, PLACES, rank_program("reduce_over_slow_link"), tmp_path) as job:
        for rank, host in enumerate(PLACES):
            job.env_of[rank] = {"ROUNDEL_INTERFACE": "eth1" if by == "name" else lab.address(host, 1)}
            if rendezvous == "wildcard":
                job.env_of[rank]["ROUNDEL_RENDEZVOUS"] = f"0.0.0.0:{PORT}" if rank == 0 else f"{lab.address(0, 1)}:{PORT}"
        job.start(0, 1, 2)
        sockets = wait_listening(lab, [2, 1])  # the rendezvous, and what ranks 1 and 2 have opened for their peers
        meeting_point = f"{lab.address(0, 1 if rendezvous == 'wildcard' else 0)}:{PORT}"
        assert meeting_point in sockets[0]
        for host in (0, 1):
            for socket in set(sockets[host]) - {meeting_point}:
                assert socket.startswith(f"{lab.address(host, 1)}:"), sockets
        job.start(3)
        job.wait_told("right")
        job.end_input()
        job.wait()
        for host in (0, 1):
            assert lab.bytes_sent(host, 1) > 8e6
            assert lab.bytes_sent(host, 0) < 1e6  # the control connections at most


def test_without_a_choice_rank_0_listens_where_others_reach_it(lab, tmp_path):
    """The rendezvous is a wildcard and rank 1, on the same host, has come first: by eth0 as the others."""
    with Job(lab, PLACES, rank_program("join_and_wait"), tmp_path) as job:
        job.env_of[0] = {"ROUNDEL_RENDEZVOUS": f"0.0.0.0:{PORT}"}
        job.start(0, 1, 2)
        sockets = wait_listening(lab, [2, 1])
        assert f"0.0.0.0:{PORT}" in sockets[0]  # as it was asked for
        job.start(3)
        job.wait_told("joined")
        assert listening(lab, 0) == listening(lab, 1) == []
        job.end_input()
        job.wait()


def test_a_rank_that_others_cannot_reach_is_named(lab, tmp_path):
    with Job(lab, PLACES, rank_program("join_and_wait"), tmp_path) as job:
        job.env_of[0] = {"ROUNDEL_RENDEZVOUS": f"0.0.0.0:{PORT}"}
        job.env_of[1] = {"ROUNDEL_RENDEZVOUS": f"127.0.0.1:{PORT}"}
        job.start()
        job.wait(seconds=20)
        for rank in range(4):
            error = job.find(rank, "error")
            assert error["error"] == "RoundelError", error
            assert "rank 1 can be reached at 127.0.0.1:" in error["text"], error
            assert "is on another host" in error["text"] and "ROUNDEL_INTERFACE" in error["text"], error


@pytest.mark.parametrize("wrong", ["eth7", "10.99.0.1"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_choice_that_is_not_there_is_named_beside_those_that_are(lab, tmp_path, wrong, rank):
    with Job(lab, PLACES, rank_program("join_and_wait"), tmp_path, ROUNDEL_START_TIMEOUT="5") as job:
        job.env_of[rank] = {"ROUNDEL_INTERFACE": wrong}
        job.start(*((0,) if rank == 0 else range(4)))
        job.wait(seconds=20)
        error = job.find(rank, "error")
        assert error["error"] == "InvalidArgumentError", error
        assert f"ROUNDEL_INTERFACE={wrong}: no interface or address of that name; this host has " in error["text"], error
        place = PLACES[rank]
        for there in ("lo (127.0.0.1)", f"eth0 ({lab.address(place)})", f"eth1 ({lab.address(place, 1)})"):
            assert there in error["text"], error
        if rank != 0:  # the others hear of it at once
            for other in (0, 1, 3):
                lost = job.find(other, "error")
                assert (lost["error"], lost["ranks"]) == ("PeerLostError", [rank]), lost
                assert lost["at"] - error["at"] < 3, lost
