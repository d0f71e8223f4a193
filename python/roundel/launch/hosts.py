"""-H and --hostfile: where horovodrun would put the ranks. All of them must be on this host."""

from __future__ import annotations

import contextlib
import re
import socket

__all__ = ["HostsError", "check_hosts", "hosts_of_file", "hosts_of_list"]

ELSEWHERE = (
    "roundelrun starts ranks on this host only. On several hosts use `torchrun --nnodes ...` there, or a scheduler that sets "
    "ROUNDEL_RANK, ROUNDEL_SIZE, ROUNDEL_RENDEZVOUS and ROUNDEL_TOKEN_FILE"
)


class HostsError(ValueError):
    """The list makes no sense, has too few slots, or needs another host."""


def hosts_of_list(text: str) -> list[tuple[str, int]]:
    """(host, slots) of "host1:2,host2:4"; slots are 1 where they are not given."""
    hosts = []
    for entry in text.split(","):
        found = re.fullmatch(r"\s*(?P<host>[^\s:\[\]]+|\[[^\s\]]+\])(?::(?P<slots>\d{1,6}))?\s*", entry)
        if found is None:
            raise HostsError(f"expected HOST:SLOTS[,HOST:SLOTS...], got {text!r}")
        hosts.append((found["host"].strip("[]"), int(found["slots"] or 1)))
    return hosts


def hosts_of_file(path: str) -> list[tuple[str, int]]:
    """(host, slots) of each line "host slots=N"; what follows '#' is a comment."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"{path} cannot be read: {error}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if line:
            found = re.fullmatch(r"(?P<host>\S+)(?:\s+slots\s*=\s*(?P<slots>\d{1,6}))?", line)
            if found is None:
                raise HostsError(f"{path}, line {number}: expected 'HOST slots=N', got {line!r}")
            hosts.append((found["host"], int(found["slots"] or 1)))
    if not hosts:
        raise HostsError(f"{path} names no host")
    return hosts


def check_hosts(hosts: list[tuple[str, int]], size: int) -> None:
    """Raises HostsError unless `size` ranks, filling the hosts in their order, are all here."""
    slots = sum(n for _, n in hosts)
    if size > slots:
        raise HostsError(f"{size} ranks are asked for, but the hosts have {slots} slots in all")
    for host, n in hosts:
        if size > 0 and n > 0 and not is_here(host):
            raise HostsError(f"rank{'s' if min(size, n) > 1 else ''} would be on {host}. {ELSEWHERE}")
        size -= n


def is_here(host: str) -> bool:
    """Is that a name or address of this host? A name that does not resolve is not."""
    if host in ("localhost", socket.gethostname()):
        return True
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(address)  # only an own address can be bound
                return True
    return False
