"""Ranks by fork: a process that has imported torch and roundel makes those of tests, in milliseconds instead of seconds.

Most of what a test of a new job costs on two cores is the same imports, once for each rank. A Rank begins as `python script
arguments` does, with its own environment, arguments and streams, nothing of roundel opened, and is a child of the tests.
Tests of how processes start and end do without.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback

PR_SET_CHILD_SUBREAPER = 36
LONGEST_ORDER = 1 << 20


class Rank(subprocess.Popen):
    """As Popen([sys.executable, script, ...], env=..., stdin=..., stdout=..., stderr=...)."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        # others: startup information, creation flags, shell, then what to read and to write: of stdin, stdout and stderr
        stdin, to_stdin, from_stdout, stdout, from_stderr, stderr = others[3:9]
        order = json.dumps({"arguments": args[1:], "env": env, "directory": os.getcwd()}).encode()
        assert args[0] == sys.executable and len(order) < LONGEST_ORDER
        libc, nursery = ctypes.CDLL(None), _nursery()
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whose maker has ended becomes this process's child
        try:
            socket.send_fds(nursery, [order], [s if s >= 0 else n for n, s in enumerate((stdin, stdout, stderr))])
            self.pid = json.loads(nursery.recv(100))
        finally:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self._child_created = True
        for theirs, ours in ((stdin, to_stdin), (stdout, from_stdout), (stderr, from_stderr)):
            if ours >= 0:  # a pipe
                os.close(theirs)


@functools.cache
def _nursery() -> socket.socket:
    """A connection to the nursery of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for s in (ours, theirs):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_ORDER)
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # no thread may be there when it forks
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env)
    theirs.close()
    return ours


def _serve(orders: socket.socket) -> tuple[dict, list[int]]:
    """Forks at each order; returns in the new ranks only."""
    while True:
        order, streams, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 3)
        if not order:
            os._exit(0)
        told, tell = os.pipe()
        maker = os.fork()
        if maker == 0:
            child = os.fork()
            if child == 0:
                for fd in (orders.detach(), told, tell):
                    os.close(fd)
                return json.loads(order), streams
            os.write(tell, json.dumps(child).encode())
            os._exit(0)
        os.waitpid(maker, 0)  # from here on the child is that of whoever has ordered it
        orders.send(os.read(told, 100))
        for fd in (*streams, told, tell):
            os.close(fd)


def _become(order: dict, streams: list[int]) -> None:
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = order["arguments"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end(code: int) -> None:
    """As an interpreter ends, but for taking apart what was imported, which costs half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    import numpy  # noqa: F401
    import roundel

    with contextlib.suppress(ImportError):  # those tests are skipped
        import roundel.torch  # noqa: F401
    gc.freeze()  # a collection would copy what is shared
    rank = _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _become(*rank)
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        _end(1)
    _end(0)
