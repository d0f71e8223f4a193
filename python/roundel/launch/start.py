"""Starting the guard, with what every rank needs: the job's token and the port where ranks meet, open beforehand."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator

from . import guard
from .options import Options

# An outer job's, when roundelrun runs inside a rank: they must not shine through to our ranks.
IDENTITY = frozenset(
    f"ROUNDEL_{name}" for name in ("RANK", "LOCAL_RANK", "RENDEZVOUS", "RENDEZVOUS_FD", "TOKEN_FD", "TOKEN_FILE")
)


@contextlib.contextmanager
def start_guard(options: Options) -> Iterator[tuple[subprocess.Popen, socket.socket]]:
    """The guard and our end of its socket. Nothing else of what it was given stays open here."""
    control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as ours, control:
        ours.enter_context(remote)
        listener = ours.enter_context(socket.create_server(("127.0.0.1", 0), backlog=max(128, options.size)))
        token_fd = sealed_memory("roundel-token", secrets.token_bytes(32))
        ours.callback(os.close, token_fd)
        config = {
            "size": options.size,
            "command": options.command,
            "grace": options.grace,
            "control_fd": remote.fileno(),
            "token_fd": token_fd,
            "rendezvous_fd": listener.fileno(),
        }
        config_fd = sealed_memory("roundel-config", json.dumps(config).encode())
        ours.callback(os.close, config_fd)
        env = {k: v for k, v in os.environ.items() if k not in IDENTITY}
        env |= options.env
        env |= {"ROUNDEL_RENDEZVOUS": f"127.0.0.1:{listener.getsockname()[1]}", "ROUNDEL_TOKEN_FD": str(token_fd)}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(config_fd)],
            env=env,
            pass_fds=(config_fd, token_fd, remote.fileno(), listener.fileno()),
            start_new_session=True,  # out of reach of the terminal's Ctrl-C and of a kill of our process group
        )
        ours.close()
        yield process, control


def sealed_memory(name: str, content: bytes) -> int:
    """A descriptor from which `content` can be read and which nobody can change."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def many_descriptors() -> None:
    """Two pipes and two files for each rank can be more than the usual soft limit of 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
