"""What the launcher says about a job that did not end well: who was first, how, and what it printed last."""

from __future__ import annotations

import collections
import dataclasses
import signal

from .output import TAIL_LINES


@dataclasses.dataclass
class Rank:
    """One rank as the launcher sees it. code: as subprocess gives it, negative for a signal; None while it runs."""

    rank: int
    pid: int
    tail: collections.deque[bytes] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))
    code: int | None = None
    by_us: bool = False  # ended by a signal that the launcher sent


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {signum}"


def shell_code(code: int) -> int:
    """The exit code that a shell would report."""
    return code if code >= 0 else 128 - code


def cause(rank: Rank) -> str:
    if rank.code is None:
        return "did not end, even after SIGKILL (uninterruptible sleep?)"
    if rank.code >= 0:
        return f"exited with code {rank.code}"
    if rank.by_us:
        return f"was stopped by the launcher with {signal_name(-rank.code)}"
    text = f"was killed by {signal_name(-rank.code)}"
    if rank.code == -signal.SIGKILL:
        text += " (if nobody sent it, the kernel's out-of-memory killer did: see dmesg)"
    return text


def failure_report(ranks: list[Rank], first: Rank) -> str:
    """Several lines: the first failure with its last output, then one line for each other rank that failed."""
    lines = [f"rank {first.rank} (pid {first.pid}) failed first: it {cause(first)}"]
    if first.tail:
        lines.append(f"the last output of rank {first.rank}:")
        lines += ["  " + text.decode(errors="backslashreplace") for text in first.tail]
    else:
        lines.append(f"rank {first.rank} has printed nothing")
    lines += [f"rank {r.rank} (pid {r.pid}) {cause(r)}" for r in ranks if r is not first and r.code != 0]
    return "\n".join(lines)


def stop_report(ranks: list[Rank], reason: str) -> str:
    """For a job that was stopped from outside: the reason, and those that had to be killed."""
    killed = [str(r.rank) for r in ranks if r.code is None or (r.by_us and r.code == -signal.SIGKILL)]
    return f"stopped by {reason}" + (f"; had to kill rank {', '.join(killed)}" if killed else "")
