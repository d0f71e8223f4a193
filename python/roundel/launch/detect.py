"""detect(): which launcher started this process, which rank it is, and where and with what token the ranks meet.

In this order: our own variables (set by roundelrun, a script or by hand), then torchrun's, then mpirun's (mpirun.py), else
none: a single process. Ranks of launchers that are known but not followed are refused: each would believe itself alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Mapping
from typing import Any

from .variables import (
    OURS,
    LaunchError,
    first_line,
    host_and_port,
    launch_error,
    number,
    rank_and_size,
    required,
    seconds,
)

__all__ = ["Launch", "LaunchError", "detect"]

TOKEN_BYTES = 32
START_TIMEOUT = 60.0  # seconds; default of ROUNDEL_START_TIMEOUT

_launches = 0  # successful detect() calls of this process: the epoch, which lets init() work again after shutdown()
_stores: dict[tuple[str, int], Any] = {}  # kept open: rank 0's own TCPStore serves the others as long as it lives
_listener: socket.socket | None = None  # rank 0's port under torchrun, until the next detect()


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process's place in a job.

    rendezvous: "host:port" (an IPv6 host in brackets) where rank 0 listens.
    rendezvous_fd: rank 0 only, and may be None: the listening socket, open already. It stays this module's: whoever
    uses it works on a dup(), because the next detect() hands out the same one (roundelrun) or closes it (torchrun).
    token: 32 bytes that only members of the job know; left out of repr() so that no log shows it. Whoever has used it
    overwrites it (init() does).
    epoch: 1, 2, ... counts the inits of this process; all ranks count alike.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    rendezvous: str
    rendezvous_fd: int | None
    token: bytearray = dataclasses.field(repr=False)
    epoch: int
    mpi: Any = None  # _core.MpiJob, where the ranks have met through MPI


def detect(environ: Mapping[str, str] = os.environ, comm: Any = None) -> Launch | None:
    """Find this process's place in its job; None when no launcher started it (a single process, size 1).

    Each call that finds a job counts as one init: all ranks have to call it equally often.

    Under torchrun, rank 0 makes the token and publishes it through the job's TCPStore, which whoever reaches
    MASTER_ADDR:MASTER_PORT can read: **such a job is as trusted as that store**. With ROUNDEL_TOKEN_FILE the token
    comes from that file on every host and only the address goes through the store.

    The same holds for mpirun's own channel; see mpirun.py. comm: an mpi4py communicator whose ranks are the job's, whoever has
    started them.

    Raises LaunchError when variables are missing, malformed, contradictory or another launcher's, ConnectionError or
    TimeoutError when the TCPStore is not reached or rank 0 does not publish within ROUNDEL_START_TIMEOUT seconds.
    """
    global _launches
    if comm is not None:
        found = _from_mpi(environ, comm, _launches + 1)
    elif any(name in environ for name in OURS):
        found = _from_our_variables(environ, _launches + 1)
    elif _torchrun(environ):
        found = _from_torchrun(environ, _launches + 1)
    elif any(environ.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) or "PMI_PORT" in environ:
        found = _from_mpi(environ, None, _launches + 1)
    else:
        _refuse_other_launchers(environ)
        return None
    _launches = found.epoch
    return found


_OTHERS = {  # what they set in the ranks of a job of several
    "horovodrun": ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_SIZE"),
    "srun": ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
}


def _refuse_other_launchers(environ: Mapping[str, str]) -> None:
    for launcher, (mark, size) in _OTHERS.items():
        if mark in environ and environ.get(size, "1") != "1":
            raise launch_error(
                f"{launcher} has started this process ({mark} and {size}={environ[size]} are set), which does not tell "
                "Roundel's ranks where to meet; roundelrun takes horovodrun's flags"
            )


# -- mpirun


def is_launched_without_mpi(environ: Mapping[str, str] = os.environ) -> bool:
    """By roundelrun, by hand or by torchrun."""
    return any(name in environ for name in OURS) or _torchrun(environ)


def _from_mpi(environ: Mapping[str, str], comm: Any, epoch: int) -> Launch | None:
    from . import mpirun  # here: the launcher's own programs read this file without the core

    token = _token_from_file(environ["ROUNDEL_TOKEN_FILE"]) if "ROUNDEL_TOKEN_FILE" in environ else None
    if comm is not None:
        met = mpirun.meet_by_communicator(comm, environ, _limit(environ), token)
    elif mpirun.is_started_by_mpirun(environ):
        met = mpirun.meet_by_mpirun(environ, epoch, _limit(environ), token)
    else:
        raise launch_error("mpirun's variables are set in part")
    return Launch(
        "mpirun" if comm is None else "mpi4py",
        met.rank, met.size, met.local_rank, met.local_size, met.rendezvous, met.rendezvous_fd, met.token, epoch, met.mpi,
    )  # fmt: skip


def _limit(environ: Mapping[str, str]) -> float:
    ours = "ROUNDEL_START_TIMEOUT"
    return seconds(environ, ours if environ.get(ours) else "HOROVOD_START_TIMEOUT", START_TIMEOUT)


def finish() -> None:
    """At the end of the process, after the job."""
    if f"{__package__}.mpirun" in sys.modules:
        sys.modules[f"{__package__}.mpirun"].finish()


# -- ours


def _from_our_variables(environ: Mapping[str, str], epoch: int) -> Launch:
    if "ROUNDEL_TOKEN_FD" not in environ and "ROUNDEL_TOKEN_FILE" not in environ:
        raise launch_error("ROUNDEL_TOKEN_FD or ROUNDEL_TOKEN_FILE must be set beside the other ROUNDEL_ variables", environ)
    rank, size = rank_and_size(environ, "ROUNDEL_RANK", "ROUNDEL_SIZE")
    local_rank, local_size = None, None
    if "ROUNDEL_LOCAL_RANK" in environ or "ROUNDEL_LOCAL_SIZE" in environ:
        local_rank, local_size = rank_and_size(environ, "ROUNDEL_LOCAL_RANK", "ROUNDEL_LOCAL_SIZE")
        if local_size > size:
            raise launch_error(f"ROUNDEL_LOCAL_SIZE={local_size} is more than ROUNDEL_SIZE={size}")
    rendezvous = host_and_port(environ, "ROUNDEL_RENDEZVOUS")
    fd = None
    if rank == 0 and "ROUNDEL_RENDEZVOUS_FD" in environ:
        fd = _listening(number(environ, "ROUNDEL_RENDEZVOUS_FD"))
    return Launch("roundel", rank, size, local_rank, local_size, rendezvous, fd, _token(environ), epoch)


def _listening(fd: int) -> int:
    try:
        with socket.socket(fileno=os.dup(fd)) as probe:
            if not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError("not listening")
    except OSError as error:
        raise launch_error(
            f"ROUNDEL_RENDEZVOUS_FD={fd} should be a listening socket inherited from the launcher, but: {error}. {_SUBPROCESS}"
        ) from error
    os.set_inheritable(fd, False)
    return fd


_SUBPROCESS = "(A program that a rank starts is not a rank: remove the ROUNDEL_ variables from its environment.)"


def _token(environ: Mapping[str, str]) -> bytearray:
    """From the launcher's descriptor, else from a file that only its owner can read."""
    if "ROUNDEL_TOKEN_FD" not in environ:
        return _token_from_file(environ["ROUNDEL_TOKEN_FILE"])
    fd = number(environ, "ROUNDEL_TOKEN_FD")
    try:
        token = _read(fd, TOKEN_BYTES + 1)
        os.set_inheritable(fd, False)
    except OSError as error:
        raise launch_error(
            f"ROUNDEL_TOKEN_FD={fd} should be a descriptor inherited from the launcher, but reading it failed: "
            f"{error.strerror}. {_SUBPROCESS}"
        ) from error
    if len(token) != TOKEN_BYTES:
        raise launch_error(f"ROUNDEL_TOKEN_FD={fd} should hold exactly {TOKEN_BYTES} bytes; it does not. {_SUBPROCESS}")
    return token


def _read(fd: int, limit: int) -> bytearray:
    """From the start, into memory that can be overwritten. The offset is shared with the other ranks: it stays as it is."""
    content = bytearray(limit)
    del content[os.preadv(fd, [content], 0) :]
    return content


def _token_from_file(path: str) -> bytearray:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us before it is refused
    except OSError as error:
        raise launch_error(f"ROUNDEL_TOKEN_FILE={path} cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(fd)  # of what is open: the path may point elsewhere by now
        if not stat.S_ISREG(status.st_mode):
            raise launch_error(f"ROUNDEL_TOKEN_FILE={path} must be a regular file")
        if status.st_uid != os.geteuid():
            raise launch_error(f"ROUNDEL_TOKEN_FILE={path} must belong to user {os.geteuid()}, not {status.st_uid}")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise launch_error(f"ROUNDEL_TOKEN_FILE={path} is open to others (mode {mode:04o}): chmod 600 {path}")
        content = _read(fd, 2 * TOKEN_BYTES + 2)
    finally:
        os.close(fd)
    if len(content) == TOKEN_BYTES:
        return content
    digits = content.removesuffix(b"\n")
    if len(digits) == 2 * TOKEN_BYTES and all(c in b"0123456789abcdefABCDEF" for c in digits):
        token = bytearray.fromhex(digits.decode())
        content[:] = bytes(len(content))
        return token
    raise launch_error(
        f"ROUNDEL_TOKEN_FILE={path} must hold exactly {TOKEN_BYTES} bytes, or {2 * TOKEN_BYTES} hexadecimal digits "
        f"(make one with: openssl rand -hex {TOKEN_BYTES})"
    )


# -- torchrun, or its variables set by hand


def _torchrun(environ: Mapping[str, str]) -> bool:
    """LOCAL_RANK is the mark: RANK and WORLD_SIZE alone are set by others too, for torchrun itself to read."""
    if "LOCAL_RANK" in environ:
        return "RANK" in environ or "WORLD_SIZE" in environ
    if "RANK" in environ and environ.get("WORLD_SIZE", "1") != "1":
        raise launch_error("RANK and WORLD_SIZE are set as torchrun does, but LOCAL_RANK is not", environ)
    return False


def _from_torchrun(environ: Mapping[str, str], epoch: int) -> Launch:
    global _listener
    rank, size = rank_and_size(environ, "RANK", "WORLD_SIZE")
    local_rank, local_size = number(environ, "LOCAL_RANK"), None
    if "LOCAL_WORLD_SIZE" in environ:
        local_rank, local_size = rank_and_size(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    master, port = required(environ, "MASTER_ADDR"), number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise launch_error(f"MASTER_PORT must be between 1 and 65535, not {port}")
    limit = _limit(environ)
    token = _token_from_file(environ["ROUNDEL_TOKEN_FILE"]) if "ROUNDEL_TOKEN_FILE" in environ else None
    # A restarted worker or a second init must not find what an earlier one has published.
    run, restart = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"roundel/{run}/{restart}/{epoch}"
    store = _store(environ, master, port, rank, limit)
    fd = None
    try:
        if rank == 0:
            several_hosts = local_size is not None and local_size < size
            if _listener is not None:
                _listener.close()
            _listener, rendezvous = _listen(master, port, several_hosts, size)
            fd = _listener.fileno()
            own = bytearray(os.urandom(TOKEN_BYTES)) if token is None else token
            store.set(key, rendezvous if token is not None else f"{rendezvous} {own.hex()}")
            token = own
        else:
            rendezvous, _, published = store.get(key).decode().partition(" ")
            if bool(published) == (token is not None):
                raise launch_error("ROUNDEL_TOKEN_FILE must be set on every rank or on none; this one and rank 0 differ")
            token = token or bytearray.fromhex(published)
    except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
        what = "could not publish the meeting point" if rank == 0 else "rank 0 has not published where to meet"
        raise TimeoutError(f"[torchrun] rank {rank}: {what} within {limit:g} s: {first_line(error)}") from error
    return Launch("torchrun", rank, size, local_rank, local_size, rendezvous, fd, token, epoch)


def _store(environ: Mapping[str, str], master: str, port: int, rank: int, limit: float) -> Any:
    """The job's TCPStore. torchrun's agent hosts it; without an agent rank 0 does, as in torch's own env:// start.

    multi_tenant: if torch.distributed is used in the same process, both share the one server on MASTER_PORT.
    """
    if (master, port) in _stores:
        return _stores[master, port]
    try:
        from torch.distributed import TCPStore
    except ImportError as error:
        raise launch_error(f"torchrun's variables are set, but torch.distributed cannot be imported: {error}") from error
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE", str("TORCHELASTIC_RUN_ID" in environ)) == "True"
    host = rank == 0 and not agent
    timeout = datetime.timedelta(seconds=limit)
    try:
        store = TCPStore(master, port, is_master=host, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        what = "cannot host" if host else "does not reach"
        raise ConnectionError(
            f"[torchrun] rank {rank} {what} the store at MASTER_ADDR:MASTER_PORT = {master}:{port} "
            f"within {limit:g} s: {first_line(error)}"
        ) from error
    _stores[master, port] = store
    return store


def _listen(master: str, port: int, several_hosts: bool, size: int) -> tuple[socket.socket, str]:
    """A listening socket on the address by which this host reaches MASTER_ADDR, and not on all of them."""
    try:
        infos = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)
        family, _, _, _, address = min(infos, key=lambda info: info[0] != socket.AF_INET)  # IPv4 where there is one
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it asks for the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise launch_error(f"MASTER_ADDR={master} cannot be resolved or reached from rank 0: {error.strerror}") from error
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        if several_hosts:
            raise launch_error(
                f"MASTER_ADDR={master} is a loopback address on rank 0's host, which ranks on other hosts cannot "
                "reach: give an address of the network between them"
            )
        family, own = socket.AF_INET, "127.0.0.1"
    listener = socket.create_server((own, 0), family=family, backlog=max(128, size))
    host = f"[{own}]" if family == socket.AF_INET6 else own
    return listener, f"{host}:{listener.getsockname()[1]}"
