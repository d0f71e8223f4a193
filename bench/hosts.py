"""`--hosts 2`: two hosts made of network namespaces (tests/parallel/netlab.py), a rank on each; the raw socket between.

The lab is made here, before there are ranks. They read of it in LAB, a file of JSON: the hosts' addresses, and a program that
runs a command on a host as ssh would, for mpirun.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shlex
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.collectives import SOCKET, Collective

ROOT = Path(__file__).parent.parent
HOSTS = 2
RENDEZVOUS_PORT = 4711  # free: the hosts are new
INTERFACE = "eth0"
BLOCK = 1 << 20  # of one call of the raw socket


@dataclass(frozen=True)
class Lab:
    addresses: list[str]
    agent: str


def read_lab(path: str) -> Lab:
    return Lab(**json.loads(Path(path).read_text()))


def run(argv: list[str], rate: str | None) -> int:
    """Start `python -m bench` with these arguments as a rank on each of HOSTS hosts; the exit code."""
    sys.path.insert(0, str(ROOT / "tests" / "parallel"))
    import netlab

    reason = netlab.why_not()
    if reason is not None:
        print(f"bench: --hosts: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that the lab is torn down
    with tempfile.TemporaryDirectory(prefix="roundel-bench-lab-") as name, netlab.NetLab(HOSTS, rate) as lab:
        directory = Path(name)
        token, agent, file = directory / "token", directory / "agent", directory / "lab.json"
        token.touch(mode=0o600)
        token.write_bytes(secrets.token_bytes(32))
        addresses = [lab.address(host) for host in range(HOSTS)]
        agent.write_text(_agent({address: shlex.join(lab._on(host, (), None)) for host, address in enumerate(addresses)}))
        agent.chmod(0o700)
        file.write_text(json.dumps({"addresses": addresses, "agent": str(agent)}))
        env = dict(os.environ) | {
            "ROUNDEL_SIZE": str(HOSTS),
            "ROUNDEL_RENDEZVOUS": f"{addresses[0]}:{RENDEZVOUS_PORT}",
            "ROUNDEL_TOKEN_FILE": str(token),
        }
        command = [sys.executable, "-m", "bench", *argv, "--lab", str(file)]
        ranks = [lab.popen(rank, command, env | {"ROUNDEL_RANK": str(rank)}) for rank in range(HOSTS)]
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        return max(abs(rank.poll() or 0) for rank in ranks)


def _agent(prefixes: dict[str, str]) -> str:
    cases = "".join(f'{address}) exec {prefix} sh -c "$*" ;;\n' for address, prefix in prefixes.items())
    return f'#!/bin/sh\nhost=$1\nshift\ncase "$host" in\n{cases}*) echo "no host $host" >&2; exit 1 ;;\nesac\n'


# -- the raw socket: what the kernel's TCP gives when both ranks send as much as they receive, at the same time


def connect(comm, lab: Lab) -> socket.socket:
    """The two ranks' own connection."""
    port = np.zeros(1, np.int64)
    if comm.rank == 0:
        with socket.create_server((lab.addresses[0], 0)) as server:
            port[0] = server.getsockname()[1]
            comm.broadcast(port, 0)
            link, _ = server.accept()
    else:
        comm.broadcast(port, 0)
        link = socket.create_connection((lab.addresses[0], int(port[0])))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setblocking(False)
    return link


def exchange(link: socket.socket, x: np.ndarray, out: np.ndarray) -> None:
    """Send x and receive out, in blocks, whichever is possible."""
    send, receive = memoryview(x.view(np.uint8)), memoryview(out.view(np.uint8))
    poll = select.poll()
    while send or receive:
        moved = 0
        if send:
            with contextlib.suppress(BlockingIOError):
                moved = link.send(send[:BLOCK])
                send = send[moved:]
        if receive:
            with contextlib.suppress(BlockingIOError):
                got = link.recv_into(receive[:BLOCK])
                if got == 0:
                    raise ConnectionError("the other rank has closed the raw socket")
                receive, moved = receive[got:], moved + got
        if not moved:
            poll.register(link, (select.POLLOUT if send else 0) | (select.POLLIN if receive else 0))
            poll.poll()


def ceiling(link: socket.socket) -> Collective:
    """As a row of CEILINGS; `traffic` is what a rank sends."""
    return Collective(
        SOCKET,
        busbw=lambda p: 1.0,
        traffic=lambda p: 1.0,
        call=lambda comm, x, out, op: functools.partial(exchange, link, x, out),
        expected=lambda job, count, calls: [(job.numbers.tables[1 - job.rank], 0, count)],
    )
