"""roundelrun: start N ranks of a command on this host, show what they print, and end them together.

The parts: options.py reads the command line, guard.py is the process that owns the ranks (so that nothing is left
behind, whatever happens to this one), output.py shows what ranks print, report.py says what went wrong. This file is
the life of one job: a single-threaded event loop over the guard's socket, the ranks' output and our signals.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import guard
from .options import Options, parse
from .output import HIGH_WATER, Console, RankStream
from .report import Rank, failure_report, shell_code, stop_report
from .start import many_descriptors, start_guard

DOUBLE_SECONDS = 0.25  # two SIGINTs closer than this are one Ctrl-C that came by way of a wrapper as well
FLUSH_SECONDS = 2.0  # for a reader of our output that has stopped reading, once we were told to stop


def main(argv: list[str] | None = None) -> int:
    """The entry point of `roundelrun`. Returns the exit code."""
    options = parse(argv)
    for fd in (0, 1, 2):  # a closed standard descriptor would be taken by the next pipe
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        return Job(options).run()
    except OSError as error:
        print(f"roundelrun: cannot start the job: {error}", file=sys.stderr)
        return 1


class Job:
    """One job from start to report. Everything runs on the main thread."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.console = Console()
        self.selector = selectors.PollSelector()  # epoll refuses regular files, and stdout may be one
        self.ranks: list[Rank] = []
        self.streams: set[RankStream] = set()
        self.first: Rank | None = None  # the rank that failed first
        self.done = False
        self.code: int | None = None  # an exit code that is not a rank's
        self.stopped: list[int] = []  # signals that told us to stop
        self.stop_time = self.done_time = 0.0
        self.reading = True

    def run(self) -> int:
        options = self.options
        directory = None
        if options.output_dir is not None:
            directory = Path(options.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        for note in options.notes:
            self.console.say(note)
        if options.verbose:
            for name, value in sorted(options.env.items()):
                self.console.say(f"{name}={value}")
        self.others = frozenset(guard.descendants(os.getpid()))  # children of a program that called main(): not ours
        guard.be_subreaper()
        with catch_signals() as self.wake, start_guard(options) as (process, self.control):
            many_descriptors()  # after the guard's start: ranks keep the limit that we came with
            self.selector.register(self.control, selectors.EVENT_READ)
            self.selector.register(self.wake, selectors.EVENT_READ)
            while not self.finished():
                self.step()
            process.wait()
        guard.be_subreaper(False)
        return self.exit_code()

    # -- the event loop

    def step(self) -> None:
        head = self.console.fd
        self.pause_or_go_on()
        if head is not None:
            self.selector.register(head, selectors.EVENT_WRITE)
        ready = self.selector.select(max(0.0, self.flush_deadline() - time.monotonic()) if self.draining() else None)
        if head is not None:
            self.selector.unregister(head)
        for key, _ in ready:
            if isinstance(key.data, RankStream):
                self.read(key.data)
            elif key.fileobj is self.wake:
                for signum in self.wake.recv(4096):
                    self.stop(signum)
            elif key.fileobj is self.control:
                self.hear()
            elif key.fd == head:
                self.console.write_some()
                if self.console.broken.get(self.console.fds[0]) == errno.EPIPE:
                    self.stop(signal.SIGPIPE)

    def read(self, stream: RankStream) -> None:
        fd = stream.fd
        if fd < 0:
            return  # end() came first in this round
        stream.read()
        if stream.fd < 0:
            self.selector.unregister(fd)
            self.streams.discard(stream)

    def pause_or_go_on(self) -> None:
        """Read ranks only as fast as our own reader takes it."""
        reading = self.console.size < HIGH_WATER
        if reading != self.reading:
            self.reading = reading
            for stream in self.streams:
                if reading:
                    self.selector.register(stream.fd, selectors.EVENT_READ, stream)
                else:
                    self.selector.unregister(stream.fd)

    def finished(self) -> bool:
        return self.done and (self.console.fd is None or (self.draining() and time.monotonic() > self.flush_deadline()))

    def draining(self) -> bool:
        """The job is over and we were told to stop: output is shown to a reader who takes it, not waited for."""
        return self.done and bool(self.stopped)

    def flush_deadline(self) -> float:
        return max(self.stop_time, self.done_time) + FLUSH_SECONDS

    # -- the guard

    def hear(self) -> None:
        """One message of the guard."""
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 2)
        message = json.loads(data) if data else {"lost": True}
        match message:
            case {"started": rank, "pid": pid}:
                self.add_rank(Rank(rank, pid), fds)
            case {"ended": rank, "code": code, "by_us": by_us}:
                self.ranks[rank].code, self.ranks[rank].by_us = code, by_us
                if code != 0 and self.first is None and not self.stopped:
                    self.first = self.ranks[rank]
            case {"failed": reason, "errno": number}:
                self.code = 127 if number == errno.ENOENT else 126
                self.console.say(f"cannot start {self.options.command[0]!r}: {reason}{hint(self.options.command[0])}")
            case {"done": _, "left": left}:
                self.end(left)
            case {"lost": _}:  # the ranks have died with the guard (PDEATHSIG); what they leave behind is ours now
                self.console.say("the guard process has ended unexpectedly; all ranks were killed")
                self.code = 1
                self.end(guard.end_tree(os.getpid(), spare=self.others))

    def add_rank(self, rank: Rank, fds: list[int]) -> None:
        self.ranks.append(rank)
        if self.options.verbose:
            self.console.say(f"rank {rank.rank} is pid {rank.pid}")
        for fd, to, name in zip(fds, self.console.fds, ("out", "err"), strict=True):
            prefix = f"[{rank.rank}]<std{name}>: ".encode() if self.options.prefix else None
            stream = RankStream(fd, prefix, self.console, to, rank.tail, self.options.timestamps)
            if self.directory is not None:
                path = self.directory / self.options.rank_files[name == "err"].format(rank=rank.rank)
                path.parent.mkdir(exist_ok=True)
                stream.file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed with the stream
            self.streams.add(stream)
            if self.reading:
                self.selector.register(fd, selectors.EVENT_READ, stream)

    def end(self, left: list[int]) -> None:
        """All ranks are gone: take in their last output and say what happened."""
        self.done, self.done_time = True, time.monotonic()
        self.selector.unregister(self.control)
        for stream in sorted(self.streams, key=lambda s: s.fd):
            if self.reading:
                self.selector.unregister(stream.fd)
            stream.drain()
        self.streams.clear()
        self.console.finish()
        if self.first is not None:
            self.console.say(failure_report(self.ranks, self.first))
        if self.stopped:
            name = "the reader of our output closing it" if self.stopped[0] == signal.SIGPIPE else None
            self.console.say(stop_report(self.ranks, name or signal.Signals(self.stopped[0]).name))
        if left:
            self.console.say(f"could not kill process {', '.join(map(str, left))}")

    # -- our own end

    def stop(self, signum: int) -> None:
        """A signal came: hand it on the first time, kill on a second Ctrl-C. Others repeat (`timeout` sends two)."""
        now = time.monotonic()
        if signum not in STOP_SIGNALS:
            return
        again = bool(self.stopped) and signum == signal.SIGINT and now - self.stop_time > DOUBLE_SECONDS
        if self.stopped and not again:
            return
        self.stopped.append(signum)
        self.stop_time = now
        if again and self.done:
            self.stop_time = self.done_time = now - FLUSH_SECONDS  # nobody reads, and they know it
        order = signal.SIGKILL if again else signal.SIGTERM if signum == signal.SIGPIPE else signum
        with contextlib.suppress(OSError):  # the guard has just ended
            self.control.send(json.dumps({"signal": order}).encode())

    def exit_code(self) -> int:
        if self.stopped:
            return 128 + self.stopped[0]
        if self.code is not None:
            return self.code
        return 0 if self.first is None else shell_code(self.first.code)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


@contextlib.contextmanager
def catch_signals() -> Iterator[socket.socket]:
    """SIGINT, SIGTERM and SIGHUP as bytes on a socket. Those that came ignored (nohup, a shell's &) stay ignored."""
    wake, notify = socket.socketpair()
    wake.setblocking(False)
    notify.setblocking(False)
    caught = [s for s in STOP_SIGNALS if s != signal.SIGPIPE and signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda *_: None) for s in caught}
    fd_before = signal.set_wakeup_fd(notify.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
    try:
        with wake, notify:
            yield wake
    finally:
        signal.set_wakeup_fd(fd_before)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def hint(command: str) -> str:
    """What the user most likely meant to type."""
    return f"; did you mean: python {command}" if command.endswith(".py") else ""
