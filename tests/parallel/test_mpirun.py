"""Jobs that mpirun starts: of pip's MPICH and pip's Open MPI. How their ranks meet, which way data takes, and how they end."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

import netlab
import pytest
from mpi_team import environment, launcher

FAMILIES = ("mpich", "openmpi")
SECONDS = 60  # no job here takes more than a few
HEAD = """
import os, sys, time
import numpy as np
import roundel
from roundel import world

def total(comm):
    return comm.allreduce(np.full(300_000, comm.rank + 1.0, np.float32))[-1]
"""


def run(family, size, code, tmp_path, wrap=(), flags=(), **env):
    """The job's exit code and what it has written."""
    if launcher(family) is None:
        pytest.skip(f"pip install {family}")
    program, extra = launcher(family)
    script = tmp_path / "job.py"
    script.write_text(HEAD + code)
    done = subprocess.run(
        [*program, *flags, "-n", str(size), *wrap, sys.executable, str(script)],
        env=environment(extra | env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout


def pretended_hosts(tmp_path):
    """A program that starts a rank on one of two pretended hosts."""
    path = tmp_path / "host"
    path.write_text(
        '#!/bin/sh\nROUNDEL_HOST_ID="host $((${PMI_RANK:-$OMPI_COMM_WORLD_RANK} % 2))" exec "$@"\n',
    )
    path.chmod(0o700)
    return [str(path)]


def says(out, line, times):
    assert sum(line in each for each in out.splitlines()) == times, out


SHOW = """
roundel.init()
comm = roundel.communicator()
sys.stdout.write(f"{comm.rank} of {comm.size}: {comm.transport} {total(comm):g} local {world.local_size()}\\n")
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_mpirun_as_launcher_alone_and_a_second_init(family, tmp_path):
    again = SHOW + "roundel.shutdown()" + SHOW
    code, out = run(family, 2, again, tmp_path)
    says(out, "of 2: shm 3 local 2", 4)
    assert code == 0, out


def test_hydra_that_listens_on_a_port(tmp_path):
    code, out = run("mpich", 2, SHOW, tmp_path, flags=["-pmi-port"])
    says(out, "of 2: shm 3", 2)
    assert code == 0, out


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_inside_hosts_and_mpi_between_them(family, tmp_path):
    wrap = pretended_hosts(tmp_path)
    code, out = run(family, 3, SHOW, tmp_path, wrap, ROUNDEL_TRANSPORT="shm+mpi", ROUNDEL_LOG_LEVEL="info")
    assert sum("of 3: shm+mpi 6" in line or "of 3: mpi 6" in line for line in out.splitlines()) == 3, out
    assert "shared memory and MPI (ROUNDEL_TRANSPORT=shm+mpi); started by way of" in out
    assert code == 0, out


def test_the_standard_abi(tmp_path):
    library = Path(sys.prefix) / "lib" / "libmpi_abi.so.1"
    if not library.exists():
        pytest.skip("pip install mpich")
    code, out = run(
        "mpich", 2, SHOW, tmp_path, ROUNDEL_TRANSPORT="mpi", ROUNDEL_MPI_LIBRARY=str(library), ROUNDEL_LOG_LEVEL="info"
    )
    says(out, "of 2: mpi 3", 2)
    assert "standard ABI" in out
    assert code == 0, out


@pytest.mark.parametrize(("family", "wrong"), [("mpich", "libmpi.so.40"), ("openmpi", "libmpi.so.12")])
def test_another_familys_library_is_refused(family, wrong, tmp_path):
    library = Path(sys.prefix) / "lib" / wrong
    if not library.exists():
        pytest.skip(f"no {wrong} from pip")
    code, out = run(family, 2, SHOW, tmp_path, ROUNDEL_TRANSPORT="mpi", ROUNDEL_MPI_LIBRARY=str(library))
    assert code != 0
    assert f"LaunchError: the job was started for MPI, but: {library} is" in out, out
    assert "is not the launcher's MPI library: set ROUNDEL_MPI_LIBRARY" in out
    assert "of 1" not in out


def test_a_library_that_knows_of_other_ranks_is_refused(tmp_path):
    lie = "os.environ['OMPI_COMM_WORLD_SIZE'] = '3'\nroundel.init()"
    code, out = run("openmpi", 2, lie, tmp_path)
    assert code != 0
    assert "of 3, but Open MPI" in out, out
    assert "that is not the launcher's MPI library" in out


DIE = """
roundel.init()
comm = roundel.communicator()
for step in range(1_000_000):
    if comm.rank == 1 and step == 20:
        os.kill(os.getpid(), 9)
    called = time.monotonic()
    try:
        total(comm)
    except roundel.PeerLostError as error:
        sys.stdout.write(f"survivor: {list(error.ranks)} {'in time' if time.monotonic() - called < 5 else 'late'}: {error}\\n")
        sys.stdout.flush()
        sys.exit(3)
"""


def test_mpich_ends_the_job_and_says_that_a_rank_was_killed(tmp_path):
    """Its mpirun kills the survivors, which may or may not have had the time to say more."""
    code, out = run("mpich", 3, DIE, tmp_path, ROUNDEL_TRANSPORT="mpi")
    assert code != 0
    assert "survivor: [1]" in out or "signal 9" in out, out


def test_open_mpi_ends_the_job_and_says_who_was_killed(tmp_path):
    code, out = run("openmpi", 3, DIE, tmp_path, ROUNDEL_TRANSPORT="mpi")
    assert code != 0
    assert "process rank 1" in out, out
    assert out.count("survivor: [1] in time") in (1, 2), out  # as many as it lets write


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_on_one_rank_ends_the_job(family, tmp_path):
    fail = "roundel.init()\nif roundel.rank() == 1: raise ValueError('mine')\ntotal(roundel.communicator())"
    code, out = run(family, 2, fail, tmp_path, ROUNDEL_TRANSPORT="mpi")
    assert code != 0
    assert "ValueError: mine" in out


OWN = """
roundel.init()
comm = roundel.communicator()
for dtype in (np.float32, np.float64, np.int32, np.uint8, np.float16):  # float16 is not MPI's
    base = (np.arange(100_000) % 3).astype(dtype)
    x = base + dtype(comm.rank)
    for op, expected in ((roundel.Max, base + dtype(1)), (roundel.Sum, base + base + dtype(1))):
        assert (comm.allreduce(x, op) == expected).all(), (dtype, op)
assert (comm.allreduce(np.full(7, comm.rank + 1.0, np.float32), roundel.Average, postscale=2.0) == 3).all()
group = comm.split(comm.rank)  # has no communicator of MPI's
assert (group.allreduce(np.ones(3)) == 1).all()
try:
    comm.allreduce(np.ones(1000 + comm.rank))
except roundel.MismatchError as error:
    sys.stdout.write("they differ\\n")
"""


@pytest.mark.parametrize(("family", "transport"), [("mpich", "mpi"), ("openmpi", "shm+mpi")])
def test_mpis_own_allreduce(family, transport, tmp_path):
    _, out = run(family, 2, OWN, tmp_path, ROUNDEL_TRANSPORT=transport, ROUNDEL_ALGORITHM="mpi")
    says(out, "they differ", 2)


def test_mpis_own_allreduce_needs_a_job_of_mpi(tmp_path):
    code, out = run("mpich", 2, SHOW, tmp_path, ROUNDEL_ALGORITHM="mpi")
    assert "ROUNDEL_ALGORITHM=mpi needs a job that was started through MPI" in out, out
    assert code != 0


COMMUNICATORS = """
from mpi4py import MPI
half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2, -MPI.COMM_WORLD.rank)
roundel.init(comm=half)
comm = roundel.communicator()
assert (comm.rank, comm.size) == (half.rank, half.size)
sys.stdout.write(f"{comm.rank} of {comm.size}: {comm.transport} {total(comm):g}\\n")
sys.stdout.write(f"{world.met_by_mpi()} {roundel._core.mpi_threads() == 'MPI_THREAD_MULTIPLE'}\\n")
assert MPI.COMM_WORLD.allreduce(1) == 4
"""


@pytest.mark.parametrize(("family", "transport"), [("mpich", "mpi"), ("openmpi", "shm")])
def test_the_ranks_of_a_communicator_are_a_job(family, transport, tmp_path):
    pytest.importorskip("mpi4py")
    code, out = run(family, 4, COMMUNICATORS, tmp_path, ROUNDEL_TRANSPORT=transport, MPI4PY_MPIABI=family)
    says(out, f"of 2: {transport} 3", 4)
    assert out.count("True True") == 4, out
    assert code == 0, out


FUNNELED = """
import mpi4py
mpi4py.rc.thread_level = "funneled"
from mpi4py import MPI
assert MPI.Query_thread() == MPI.THREAD_FUNNELED
"""


def test_an_mpi_for_one_thread_starts_jobs_but_carries_no_data(tmp_path):
    pytest.importorskip("mpi4py")
    code, out = run("mpich", 2, FUNNELED + SHOW, tmp_path, MPI4PY_MPIABI="mpich")
    says(out, "of 2: shm 3", 2)
    assert code == 0, out
    code, out = run("mpich", 2, FUNNELED + SHOW, tmp_path, MPI4PY_MPIABI="mpich", ROUNDEL_TRANSPORT="mpi")
    assert "ROUNDEL_TRANSPORT=mpi needs MPI_THREAD_SERIALIZED at least" in out, out
    assert code != 0


def test_mpi_is_there_for_the_script_afterwards(tmp_path):
    pytest.importorskip("mpi4py")
    after = SHOW + "from mpi4py import MPI\nassert MPI.COMM_WORLD.allreduce(1) == 2\n"
    for transport in ("auto", "mpi"):
        code, out = run("mpich", 2, after, tmp_path, MPI4PY_MPIABI="mpich", ROUNDEL_TRANSPORT=transport)
        assert code == 0, out


def test_data_over_mpi_needs_a_job_of_mpi():
    code = "import roundel; roundel.init()"
    roundelrun = [sys.executable, "-m", "roundel.launch", "-np", "2", sys.executable, "-c", code]
    done = subprocess.run(
        roundelrun, env=environment({"ROUNDEL_TRANSPORT": "mpi"}), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode != 0
    assert "ROUNDEL_TRANSPORT=mpi, but neither mpirun nor init(comm=...) has started this job" in done.stdout + done.stderr


# -- two hosts: network namespaces, entered by a program where mpirun expects ssh


@contextlib.contextmanager
def two_hosts(tmp_path):
    reason = netlab.why_not()
    if reason is not None:
        pytest.skip(reason)
    with netlab.NetLab(hosts=2, rate="500mbit") as lab:
        cases = "".join(f'{lab.address(h)}) exec {shlex.join(lab._on(h, (), None))} sh -c "$*" ;;\n' for h in range(2))
        agent = tmp_path / "agent"
        agent.write_text(f'#!/bin/sh\n[ "$1" = -x ] && shift\nhost=$1\nshift\ncase "$host" in\n{cases}*) exit 9 ;;\nesac\n')
        agent.chmod(0o700)
        yield lab, str(agent)


def start_on_two_hosts(lab, agent, family, script, **env):
    """Three ranks, two of them on the first host."""
    program, extra = launcher(family)
    first, second = lab.address(0), lab.address(1)
    if family == "mpich":
        flags = ["-launcher", "ssh", "-launcher-exec", agent, "-hosts", f"{first}:2,{second}:1", "-localhost", first]
        flags += ["-iface", "eth0"]
    else:
        flags = ["--host", f"{first}:2,{second}:1", "--prtemca", "plm_ssh_agent", agent]
        flags += ["--prtemca", "prte_if_include", "eth0"]
        flags += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0"]
    return lab.popen(
        0, [*program, *flags, "-n", "3", sys.executable, str(script)], environment(extra | {"FI_PROVIDER": "tcp"} | env),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("transport", ["auto", "shm+mpi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_on_two_hosts(family, transport, tmp_path):
    if launcher(family) is None:
        pytest.skip(f"pip install {family}")
    script = tmp_path / "job.py"
    script.write_text(HEAD + SHOW)
    with two_hosts(tmp_path) as (lab, agent):
        job = start_on_two_hosts(lab, agent, family, script, ROUNDEL_TRANSPORT=transport, ROUNDEL_LOG_LEVEL="info")
        try:
            out = job.communicate(timeout=SECONDS)[0]
        finally:
            job.kill()
    across = "mpi" if transport == "shm+mpi" else "tcp"
    assert sum(f"of 3: shm+{across} 6" in line or f"of 3: {across} 6" in line for line in out.splitlines()) == 3, out
    assert "3 ranks on 2 hosts" in out
    assert job.returncode == 0, out


PARTED = """
roundel.init()
comm = roundel.communicator()
open(os.path.dirname(sys.argv[0]) + f"/started{comm.rank}", "w").close()
try:
    while True:
        total(comm)
except roundel.RoundelError as error:
    open(os.path.dirname(sys.argv[0]) + f"/ended{comm.rank}", "w").write(f"{type(error).__name__}: {error}")
    time.sleep(3)  # mpirun ends the others when this one ends
"""


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_a_link_that_goes_down_while_mpi_is_at_work(family, tmp_path):
    if launcher(family) is None:
        pytest.skip(f"pip install {family}")
    script = tmp_path / "job.py"
    script.write_text(HEAD + PARTED)
    with two_hosts(tmp_path) as (lab, agent):
        job = start_on_two_hosts(lab, agent, family, script, ROUNDEL_TRANSPORT="shm+mpi", ROUNDEL_DEAD_SECONDS="2")
        try:
            wait_for(tmp_path, "started", 20)
            lab.set_link(1, up=False)
            ends = wait_for(tmp_path, "ended", 9)
        finally:
            job.kill()
    assert all(end.startswith("PeerLostError") and "rank 2" in end for end in ends[:2]), ends
    assert ends[2].startswith("FencedError"), ends


def wait_for(directory, name, seconds):
    """What all three ranks have written."""
    paths = [directory / f"{name}{rank}" for rank in range(3)]
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [path.name for path in paths if path.exists()]
        time.sleep(0.05)
    time.sleep(0.2)  # for what is being written
    return [path.read_text() for path in paths]
