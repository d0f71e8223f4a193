"""Jobs started by mpirun, and jobs of an mpi4py communicator: which rank this is, and how the ranks learn where to meet.

MPICH's kind of mpirun (Hydra) has a table of texts for its processes (pmi.py): no MPI library is needed. Open MPI's has none
that needs no library: MPI itself is opened and initialized. So it is under Hydra where data is to travel over MPI, or where
the program has initialized MPI already.

Every rank tells rank 0 its host and addresses. Rank 0 listens where all others can reach it and tells them, with a token made
for the job: **such a job is as trusted as its mpirun**. With ROUNDEL_TOKEN_FILE the token comes from that file on every host.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roundel import _core

from .pmi import Pmi
from .variables import launch_error, rank_and_size

__all__ = ["Meeting", "finish", "is_started_by_mpirun", "meet_by_communicator", "meet_by_mpirun"]

OPENMPI, HYDRA = "Open MPI's mpirun", "an mpirun of MPICH's kind"
MPI_TRANSPORTS = ("mpi", "shm+mpi")
_SUBPROCESS = "(A program that a rank starts is not a rank: remove the launcher's variables from its environment.)"

_pmi: Pmi | None = None  # kept: the launcher greets a process once
_listener: socket.socket | None = None  # rank 0's port, until the next meeting


class Meeting:
    """What the ranks have agreed on. mpi: the job as MPI knows it, where MPI was used to meet."""

    def __init__(self, rank: int, size: int, mpi: Any) -> None:
        self.rank, self.size, self.mpi = rank, size, mpi
        self.local_rank: int | None = None
        self.local_size: int | None = None
        self.rendezvous = ""
        self.rendezvous_fd: int | None = None
        self.token = bytearray()


def is_started_by_mpirun(environ: Mapping[str, str]) -> bool:
    """As one of several ranks."""
    return launcher_of(environ) is not None


def launcher_of(environ: Mapping[str, str]) -> str | None:
    if "OMPI_COMM_WORLD_RANK" in environ and environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return OPENMPI
    if "PMI_RANK" in environ and environ.get("PMI_SIZE", "1") != "1":
        return HYDRA
    if "PMI_PORT" in environ and "PMI_ID" in environ and "PMI_RANK" not in environ:
        return HYDRA  # tells rank and size there
    return None


def meet_by_mpirun(environ: Mapping[str, str], epoch: int, limit: float, token: bytearray | None) -> Meeting:
    """Raises LaunchError, TimeoutError, ConnectionError."""
    launcher = launcher_of(environ)
    if launcher == OPENMPI:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        local = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    else:
        names, local = ("PMI_RANK", "PMI_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    place = rank_and_size(environ, *names) if names[0] in environ else None
    by_mpi = launcher == OPENMPI or environ.get("ROUNDEL_TRANSPORT") in MPI_TRANSPORTS or _core.mpi_threads() is not None
    meeting = _by_mpi(environ, launcher, place, limit, token) if by_mpi else _by_pmi(environ, epoch, limit, token)
    if all(name in environ for name in local):
        meeting.local_rank, meeting.local_size = rank_and_size(environ, *local)
    return meeting


def meet_by_communicator(comm: Any, environ: Mapping[str, str], limit: float, token: bytearray | None) -> Meeting:
    """comm: mpi4py's; its ranks are the job's."""
    from mpi4py import MPI

    job = _open("", MPI.__file__, MPI._addressof(comm), limit)
    if job.size != comm.Get_size() or job.rank != comm.Get_rank():
        raise launch_error(
            f"mpi4py uses another MPI library than {job.describe()}, which this process has opened: start with init(comm=...), "
            "or set ROUNDEL_MPI_LIBRARY to mpi4py's"
        )
    return _agree(Meeting(job.rank, job.size, job), _over_mpi(job, limit), environ, token)


def _by_mpi(
    environ: Mapping[str, str], launcher: str, place: tuple[int, int] | None, limit: float, token: bytearray | None
) -> Meeting:
    opener = getattr(sys.modules.get("mpi4py.MPI"), "__file__", "")
    job = _open("openmpi" if launcher == OPENMPI else "mpich", opener, 0, limit)
    if place is not None and (job.rank, job.size) != place:
        raise launch_error(
            f"{launcher} has started this process as rank {place[0]} of {place[1]}, but {job.describe()} makes it rank "
            f"{job.rank} of {job.size}: that is not the launcher's MPI library. Set ROUNDEL_MPI_LIBRARY to the one that "
            "belongs to it"
        )
    return _agree(Meeting(job.rank, job.size, job), _over_mpi(job, limit), environ, token)


def _open(family: str, opener: str, address: int, limit: float) -> Any:
    prefixes = dict.fromkeys((sys.prefix, os.environ.get("OPAL_PREFIX", ""), os.environ.get("OMPI_LIBDIR_LOC", "") + "/.."))
    folders = [str(Path(prefix) / "lib") for prefix in prefixes if prefix and prefix != "/.."]
    try:
        return _core.MpiJob(family, opener, folders, address, limit)
    except (TimeoutError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise launch_error(f"the job was started for MPI, but: {error}. {_SUBPROCESS}") from error


Share = Callable[[str, Callable[[list[str]], str]], str]  # own text, what rank 0 makes of all of them -> that, on every rank


def _over_mpi(job: Any, limit: float) -> Share:
    def share(own: str, decide: Callable[[list[str]], str]) -> str:
        texts = job.gather(own, limit)
        return job.gather(decide(texts) if job.rank == 0 else "", limit)[0]

    return share


def _by_pmi(environ: Mapping[str, str], epoch: int, limit: float, token: bytearray | None) -> Meeting:
    global _pmi
    if _pmi is None:
        _pmi = Pmi(environ, limit)
    pmi = _pmi
    pmi.extend(limit)

    def share(own: str, decide: Callable[[list[str]], str]) -> str:
        pmi.put(f"roundel-{epoch}-{pmi.rank}", own.encode().hex())
        pmi.barrier()
        if pmi.rank == 0:
            texts = [bytes.fromhex(pmi.get(f"roundel-{epoch}-{r}")).decode() for r in range(pmi.size)]
            pmi.put(f"roundel-{epoch}-all", decide(texts).encode().hex())
        pmi.barrier()
        return bytes.fromhex(pmi.get(f"roundel-{epoch}-all")).decode()

    return _agree(Meeting(pmi.rank, pmi.size, None), share, environ, token)


# -- where the ranks meet


def _agree(meeting: Meeting, share: Share, environ: Mapping[str, str], token: bytearray | None) -> Meeting:
    error = ""

    def decide(texts: list[str]) -> str:
        nonlocal error
        try:
            places = [json.loads(text) for text in texts]
            if any(place["token"] != places[0]["token"] for place in places):
                raise launch_error("ROUNDEL_TOKEN_FILE must be set on every rank or on none")
            address = _address_for(places, environ)
            _listen(meeting, address)
        except (ValueError, OSError) as e:
            error = str(e)
            return json.dumps({"error": error})
        meeting.token = bytearray(os.urandom(32)) if token is None else token
        return json.dumps({"rendezvous": meeting.rendezvous, "token": "" if token is not None else meeting.token.hex()})

    own = {"host": _host(), "addresses": _addresses(), "token": token is not None}
    agreed = json.loads(share(json.dumps(own, separators=(",", ":")), decide))
    if "error" in agreed:
        raise launch_error(f"rank 0 cannot tell the others where to meet: {agreed['error']}")
    meeting.rendezvous = agreed["rendezvous"]
    meeting.token = token if token is not None else bytearray.fromhex(agreed["token"])
    return meeting


def _host() -> str:
    """Equal on ranks that reach each other over loopback."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:18] + os.readlink("/proc/self/ns/net")


def _addresses() -> list[str]:
    """As "10.0.0.1/24", the most that the launcher's table can hold."""
    found = [f"{address}/{bits}" for _, address, bits in _core.addresses() if not ipaddress.ip_address(address).is_loopback]
    found.sort(key=lambda each: ":" in each)  # IPv4 first
    while len(json.dumps(found)) > 350:
        found.pop()
    return found


def _address_for(places: list[dict[str, Any]], environ: Mapping[str, str]) -> str:
    """Of rank 0's addresses the one to listen at: in a network that all ranks of other hosts are in too."""
    others = [place for place in places if place["host"] != places[0]["host"]]
    wanted = environ.get("ROUNDEL_INTERFACE") or environ.get("HOROVOD_GLOO_IFACE")
    if wanted:
        named = [address for name, address, _ in _core.addresses() if wanted in (name, address)]
        if not named:
            raise ValueError(f"ROUNDEL_INTERFACE={wanted}: rank 0's host has no interface or address of that name")
        return min(named, key=lambda address: ":" in address)
    if not others:
        return "127.0.0.1"
    for each in places[0]["addresses"]:
        network = ipaddress.ip_interface(each).network
        if all(any(ipaddress.ip_interface(a).ip in network for a in place["addresses"]) for place in others):
            return each.partition("/")[0]
    return _routed(places[0]["addresses"])


def _routed(addresses: list[str]) -> str:
    """No network in common: the address by which this host reaches the world, else its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks for the route
            return probe.getsockname()[0]
        except OSError:
            if addresses:
                return addresses[0].partition("/")[0]
    raise ValueError("its host has no address but loopback, and there are ranks on other hosts")


def _listen(meeting: Meeting, address: str) -> None:
    global _listener
    if _listener is not None:
        _listener.close()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listener = socket.create_server((address, 0), family=family, backlog=max(128, meeting.size))
    host = f"[{address}]" if family == socket.AF_INET6 else address
    meeting.rendezvous = f"{host}:{_listener.getsockname()[1]}"
    meeting.rendezvous_fd = _listener.fileno()


def finish() -> None:
    """At the end of the process: what the launcher wants to hear of a rank that has ended in order."""
    global _pmi
    _core.finish_mpi()
    if _pmi is not None and not _core.in_forked_child():
        pmi, _pmi = _pmi, None
        pmi.close(finish=_core.mpi_threads() is None)
