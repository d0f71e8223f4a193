"""500 ranks killed at random moments of checked collectives: no hang, no wrong bit, all survivors raise within a second."""

from __future__ import annotations

import os
import random
import statistics
import time
from contextlib import nullcontext

import pytest
from fault_job import BOUND, FaultJob
from netlab import NetLab, why_not

SHARE = float(os.environ.get("SOAK_SHARE", "1"))  # of all kills, for a shorter run

# name: (kills, size, transport, hosts of the ranks, forked children)
SOAK = {
    "shm": (200, 3, "shm", None, False),
    "tcp between hosts": (100, 2, "tcp", [0, 1], False),
    "four ranks on two hosts": (50, 4, "hosts", [0, 0, 1, 1], False),
    "forked children, shm": (75, 3, "shm", None, True),
    "forked children, tcp": (75, 3, "tcp", None, True),
}


def kill_one(directory, seed: int, size: int, transport: str, lab, places, fork: bool) -> list[float]:
    """How long each survivor took to raise."""
    rng = random.Random(seed)
    victim = size - 1 if fork else rng.randrange(size)
    env = {"ROUNDEL_HOST_ID": ""} if lab else {}
    arguments = ("mixed", seed + 1, *(("fork",) if fork else ()))
    with FaultJob(size, transport, directory, *arguments, env=env, lab=lab, places=places) as job:
        job.wait_running()
        time.sleep(rng.uniform(0, 0.25))
        killed = job.kill(victim)
        took = []
        for rank in set(range(size)) - {victim}:
            error = job.error_of(rank, timeout=30)
            assert (error["error"], error["ranks"]) == ("PeerLostError", [victim]), f"seed {seed}, rank {rank}: {error}"
            assert error["op"], error
            took.append(error["at"] - killed)
    return took


def kill_many(directory, kills: int, size: int, transport: str, places, fork: bool, first_seed: int = 0) -> list[float]:
    took = []
    with NetLab(max(places) + 1) if places else nullcontext() as lab:
        for seed in range(first_seed, first_seed + kills):
            took += kill_one(directory, seed, size, transport, lab, places, fork)
    return took


@pytest.mark.parametrize("what", SOAK)
def test_a_few_kills(what, tmp_path):
    _, size, transport, places, fork = SOAK[what]
    if places and why_not():
        pytest.skip(why_not())
    took = kill_many(tmp_path, 2, size, transport, places, fork)
    assert max(took) < 3 * BOUND, took  # this machine may be busy


@pytest.mark.soak
@pytest.mark.parametrize("what", SOAK)
def test_five_hundred_kills(what, tmp_path):
    kills, size, transport, places, fork = SOAK[what]
    kills = max(1, round(kills * SHARE))
    if places and why_not():
        pytest.skip(why_not())
    took = kill_many(tmp_path, kills, size, transport, places, fork, first_seed=10_000)
    print(
        f"{what}: {kills} kills, {size} ranks, noticed after {statistics.median(took) * 1e3:.1f} ms, "
        f"at most {max(took) * 1e3:.1f} ms"
    )
    assert max(took) < BOUND, sorted(took)[-5:]
