"""PMI-1, what MPICH's kind of mpirun offers its processes: a table of texts and a barrier, over an inherited socket.

Lines such as `cmd=put kvsname=kvs_1 key=a value=b`, each answered by one. No MPI library is needed, and one that comes later in
the same process can use the socket as if nobody had.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping

from .variables import launch_error, number, rank_and_size

__all__ = ["Pmi"]

MOST_VALUE = 1000  # bytes; MPICH's table takes 1024


class Pmi:
    """A process's connection to its launcher. One for each process: the launcher greets nobody twice."""

    def __init__(self, environ: Mapping[str, str], seconds: float) -> None:
        self.rank, self.size = 0, 1
        self.deadline = time.monotonic() + seconds
        self._rest = b""
        if "PMI_FD" in environ:
            self.rank, self.size = rank_and_size(environ, "PMI_RANK", "PMI_SIZE")
            fd = number(environ, "PMI_FD")
            try:
                self._socket = socket.socket(fileno=os.dup(fd))
            except OSError as error:
                raise launch_error(f"PMI_FD={fd} should be a socket inherited from mpirun, but: {error.strerror}") from error
        else:
            host, _, port = environ.get("PMI_PORT", "").rpartition(":")
            if not host or not port.isdigit():
                raise launch_error("neither PMI_FD nor PMI_PORT=host:port tells how to reach the launcher")
            try:
                self._socket = socket.create_connection((host, int(port)), timeout=seconds)
            except OSError as error:
                raise launch_error(f"the launcher cannot be reached at PMI_PORT={host}:{port}: {error}") from error
            self._send(f"cmd=initack pmiid={number(environ, 'PMI_ID')}")
            told: dict[str, str] = {}
            for _ in range(4):  # initack, then size, rank and debug
                told |= self._answer("the launcher's greeting")
            self.rank, self.size = rank_and_size(told, "rank", "size")
        self._ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")
        self._table = self._ask("cmd=get_my_kvsname", "my_kvsname")["kvsname"]

    def extend(self, seconds: float) -> None:
        """How long what follows may take in all."""
        self.deadline = time.monotonic() + seconds

    def put(self, key: str, value: str) -> None:
        """For others to get after the next barrier. value: ASCII without spaces."""
        if not 0 < len(value) <= MOST_VALUE:
            raise ValueError(f"PMI: a value of {len(value)} bytes, which the launcher's table cannot hold")
        self._ask(f"cmd=put kvsname={self._table} key={key} value={value}", "put_result")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._ask("cmd=barrier_in", "barrier_out")

    def get(self, key: str) -> str:
        """What a rank has put before the last barrier."""
        return self._ask(f"cmd=get kvsname={self._table} key={key}", "get_result")["value"]

    def close(self, finish: bool) -> None:
        """finish: nobody in this process uses the launcher's table any more, and its end is in order."""
        if finish:
            self._ask("cmd=finalize", "finalize_ack")
        self._socket.close()

    def _ask(self, command: str, answer: str) -> dict[str, str]:
        self._send(command)
        fields = self._answer(command.split()[0])
        if fields.get("cmd") != answer or fields.get("rc", "0") != "0":
            raise launch_error(f"PMI: mpirun answered {fields} to {command.split()[0]!r}")
        return fields

    def _send(self, command: str) -> None:
        try:
            self._socket.sendall(command.encode() + b"\n")
        except OSError as error:
            raise ConnectionError(f"[pmi] rank {self.rank}: mpirun has closed its connection: {error}") from error

    def _answer(self, what: str) -> dict[str, str]:
        while b"\n" not in self._rest:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise TimeoutError(f"[pmi] rank {self.rank}: no answer to {what} in time: not all ranks have come")
            data = self._socket.recv(4096)
            if not data:
                raise ConnectionError(f"[pmi] rank {self.rank}: mpirun has closed its connection")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(word.split("=", 1) for word in line.decode().split() if "=" in word)
