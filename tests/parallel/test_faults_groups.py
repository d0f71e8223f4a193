"""Groups of split() after a death: what their ranks are told is who died, not who has left the group because of that.

One rank hears of the death in the job and leaves everything. Those that wait for it in a group see its goodbye; if the dead
one was not in the group, only their job can tell them why.
"""

from __future__ import annotations

import time

import pytest
from fault_job import BOUND, FaultJob

SIZE, LEAVER = 4, 1
CALLS = [(1, "allreduce", 2), (1, "recv", 0), (2, "recv", 2), (2, "allreduce", 0)]  # depth of the splits, call, victim


@pytest.mark.parametrize("transport", ["shm", "tcp", "hosts"])
@pytest.mark.parametrize("members", ["inside", "outside"])
@pytest.mark.parametrize(("depth", "call", "victim"), CALLS)
def test_a_group_names_the_dead_and_not_who_left_because_of_it(transport, members, depth, call, victim, tmp_path):
    with FaultJob(SIZE, transport, tmp_path, "groups", members, depth, call, victim) as job:
        job.wait_running()
        killed = job.kill(victim)
        for rank in set(range(SIZE)) - {victim}:
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [victim]), error
            assert "operation" in error["op"] or "recv" in error["op"], error
            assert ("in a group" in error["text"]) == (rank != LEAVER), error
            assert error["at"] - killed < 3 * BOUND, error


@pytest.mark.parametrize("transport", ["shm", "tcp", "hosts"])
@pytest.mark.parametrize("trouble", ["timeout", "loss"])
def test_an_earlier_trouble_of_the_job_is_not_why_a_group_loses_a_rank(transport, trouble, tmp_path):
    with FaultJob(SIZE, transport, tmp_path, "groups_go_on", trouble) as job:
        job.wait_running()
        killed = job.kill(2)
        for rank in (0, 1):
            error = job.error_of(rank)
            assert error["error"] == "PeerLostError" and 2 in error["ranks"], error
            assert "has left" not in error["text"] and error["at"] - killed < 3 * BOUND, error


@pytest.mark.parametrize("transport", ["shm", "tcp", "hosts"])
@pytest.mark.parametrize("victim", [2, 0])
def test_a_split_of_a_group_does_not_wait_for_a_rank_that_has_left(transport, victim, tmp_path):
    """It leaves after it has called the split, before it has met the others."""
    slow = {"ROUNDEL_FAILPOINT": "start-connect=sleep:5@4"}  # after those of the job, the engine and the group
    with FaultJob(SIZE, transport, tmp_path, "groups", "outside", 1, "split", victim, env_of={LEAVER: slow}) as job:
        job.wait_running()
        time.sleep(0.1)
        killed = job.kill(victim)
        for rank in set(range(SIZE)) - {victim, LEAVER}:
            error = job.error_of(rank)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [victim]), error
            assert "split" in error["op"] and error["at"] - killed < 3 * BOUND, error
