"""What ranks print, line by line and with their rank in front, through a queue that never blocks the launcher.

`Lines` cuts one rank's stream into lines; `Console` is the launcher's own stdout and stderr with one queue for both, so
that lines never mix; `RankStream` leads from one to the other and keeps the last lines for the report.

A line that is updated by carriage returns (a progress bar) is shown as it goes when the console is a terminal: as a
passing last row that the next output replaces. Elsewhere only its last state is kept.
"""

from __future__ import annotations

import collections
import errno
import os
import select
import stat
import time
from typing import BinaryIO

MAX_LINE = 1 << 20  # a longer line is broken, so that a rank that never ends its line cannot fill the memory
TAIL_LINES, TAIL_BYTES = 10, 1000  # what the report shows of a failed rank: lines, and bytes of each
HIGH_WATER = 4 << 20  # queued bytes from which on ranks are not read: they wait in write(), as before a slow terminal
READ_BYTES = 1 << 16


class Lines:
    """Cuts a stream into lines. A '\\r' that does not end a line starts it anew, as on a terminal."""

    def __init__(self) -> None:
        self.pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends."""
        if b"\n" not in data and len(self.pending) + len(data) <= MAX_LINE:
            self.pending = last_state(self.pending + data)
            return []
        *lines, self.pending = (self.pending + data).split(b"\n")
        if b"\r" in data or any(b"\r" in line for line in lines[:1]):
            lines = [last_state(line).rstrip(b"\r") for line in lines]
            self.pending = last_state(self.pending)
        while len(self.pending) > MAX_LINE:
            lines.append(self.pending[:MAX_LINE])
            self.pending = self.pending[MAX_LINE:]
        return lines

    def rest(self) -> list[bytes]:
        """The unfinished line at the end of the stream, unless a progress bar has wiped itself away."""
        line, self.pending = self.pending.rstrip(b"\r"), b""
        return [line] if line.strip() else []


def last_state(line: bytes) -> bytes:
    """What is left of a line after its last carriage return that something follows; trailing ones stay."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


class Console:
    """The launcher's stdout and stderr. One queue, emptied in order: a line is whole before the next one starts.

    write_some() is called when `fd` polls writable and then does not block: a pipe that does takes PIPE_BUF bytes.
    """

    def __init__(self, out: int = 1, err: int = 2) -> None:
        self.fds = (out, err)
        self.size = 0  # bytes queued
        self.queue: collections.deque[tuple[int, memoryview]] = collections.deque()
        self.broken: dict[int, int] = {}  # fd -> errno; what goes there is dropped
        self.terminals = frozenset(fd for fd in self.fds if os.isatty(fd))
        self.update_shown = False
        self.wipe = b"\r" if os.environ.get("TERM") == "dumb" else b"\r\x1b[K"

    @property
    def fd(self) -> int | None:
        """Where the head of the queue goes; None when there is nothing to write."""
        return self.queue[0][0] if self.queue else None

    def put(self, fd: int, data: bytes) -> None:
        if fd not in self.broken and data:
            self.queue.append((fd, memoryview(data)))
            self.size += len(data)

    def put_lines(self, fd: int, data: bytes) -> None:
        """Whole lines; they replace a passing update."""
        if fd in self.terminals and self.update_shown:
            self.update_shown = False
            data = self.wipe + data
        self.put(fd, data)

    def put_update(self, fd: int, line: bytes) -> None:
        """An unfinished line, on a terminal only; left out when the terminal does not keep up."""
        if fd in self.terminals and self.size < READ_BYTES:
            columns = os.get_terminal_size(fd).columns or 80
            text = line.decode(errors="replace")[: columns - 1]  # a wrapped row could not be wiped
            self.put(fd, self.wipe + text.encode())
            self.update_shown = True

    def say(self, text: str) -> None:
        """The launcher's own words."""
        for line in text.splitlines():
            self.put_lines(self.fds[1], b"roundelrun: " + line.encode(errors="surrogateescape") + b"\n")

    def finish(self) -> None:
        """Take away a passing update that nothing has replaced."""
        for fd in self.terminals if self.update_shown else ():
            self.put_lines(fd, b"")

    def write_some(self) -> None:
        fd, data = self.queue.popleft()
        try:
            done = os.write(fd, data[: self.portion(fd)])
        except BlockingIOError:  # somebody else made the descriptor non-blocking
            done = 0
        except OSError as error:
            self.broken[fd] = error.errno or errno.EIO
            self.queue = collections.deque(entry for entry in self.queue if entry[0] != fd)
            self.size = sum(len(entry[1]) for entry in self.queue)
            return
        self.size -= done
        if done < len(data):
            self.queue.appendleft((fd, data[done:]))

    def portion(self, fd: int) -> int:
        if fd in self.terminals:
            return 1024  # a terminal polls writable with little room left
        return 1 << 20 if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF


class RankStream:
    """One rank's stdout or stderr, from its pipe to the console and to a file."""

    def __init__(
        self, fd: int, prefix: bytes | None, console: Console, to: int, tail: collections.deque, timestamps: bool = False
    ) -> None:
        """prefix: None hands the bytes on as they are. to: the console's descriptor. tail: shared by both streams."""
        os.set_blocking(fd, False)
        self.fd, self.prefix, self.console, self.to, self.tail = fd, prefix, console, to, tail
        self.timestamps = timestamps
        self.lines = Lines()
        self.file: BinaryIO | None = None
        self.label = b"<stdout> " if to == console.fds[0] else b"<stderr> "

    def read(self) -> bool:
        """Take in what is there; False when that was nothing. At the end of the stream it is closed (fd is -1 then)."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self.write_file(data)
        if self.prefix is None:
            self.console.put(self.to, data)
        self.show(self.lines.feed(data))
        if self.prefix is not None and self.lines.pending:
            self.console.put_update(self.to, self.start() + self.lines.pending.rstrip(b"\r"))
        return True

    def show(self, lines: list[bytes]) -> None:
        self.tail.extend(self.label + line[:TAIL_BYTES] for line in lines[-TAIL_LINES:])
        if lines and self.prefix is not None:
            start = self.start()
            self.console.put_lines(self.to, b"".join([start + line + b"\n" for line in lines]))

    def start(self) -> bytes:
        """What comes before a line: horovodrun's form of the time, then the rank and the stream."""
        assert self.prefix is not None
        return time.strftime("%a %b %d %H:%M:%S %Y").encode() + self.prefix if self.timestamps else self.prefix

    def write_file(self, data: bytes) -> None:
        if self.file is not None:
            try:
                self.file.write(data)
            except OSError as error:  # a full disk must not end the job
                self.console.say(f"cannot write {self.file.name}: {error.strerror}; the rest is not kept")
                self.file = None

    def drain(self) -> None:
        """Take in what a dead rank has left in the pipe (1 MiB at most), then close, whoever else may hold its end."""
        for _ in range((1 << 20) // READ_BYTES):
            if self.fd < 0 or not self.read():
                break
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            self.show(self.lines.rest())
            os.close(self.fd)
            self.fd = -1
            if self.file is not None:
                self.file.close()
