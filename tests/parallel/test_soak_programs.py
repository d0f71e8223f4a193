"""Random programs of all collectives against arithmetic: a slice in every run, 100,000 calls with `make soak`."""

from __future__ import annotations

import os

import programs
import pytest
from team import Team

TEAMS = [("shm", 2), ("tcp", 2), ("shm", 4), ("hosts", 4)]
SOAK = [("shm", n) for n in range(1, 9)] + [("tcp", 2), ("tcp", 3), ("hosts", 4), ("hosts", 7), ("ring", 5), ("tree", 6)]
SOAK += [("hierarchical", 4), ("hierarchical", 8)]
SHARE = float(os.environ.get("SOAK_SHARE", "1"))  # of all rounds, for a shorter run
CALLS, ROUNDS = 625, max(1, round(10 * SHARE))  # a round is under the team's watchdog; in all 16 teams x 10 x 625 = 100,000


def test_random_programs(comm):
    """1,000 at each of these teams."""
    for seed in range(10):
        programs.run(comm, seed, 100)


def run_round(comm, seed: int) -> None:
    """On a rank, by worker.py."""
    programs.run(comm, seed, CALLS)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "size"), SOAK)
def test_a_hundred_thousand_random_collectives(transport, size):
    with Team(size, transport) as team:
        for seed in range(ROUNDS):
            team.run("test_soak_programs", "run_round", {"seed": 1000 * size + seed})
