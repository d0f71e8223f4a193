"""roundelrun's command line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Callable

EXAMPLE = "example: roundelrun -np 4 python train.py"


@dataclasses.dataclass(frozen=True)
class Options:
    size: int
    command: list[str]
    grace: float
    output_dir: str | None
    prefix: bool
    verbose: bool
    env: dict[str, str]  # set in every rank, apart from what differs between ranks


def version() -> str:
    try:
        return importlib.metadata.version("roundel")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown (not installed)"


def parse(argv: list[str] | None) -> Options:
    """Options from the command line; ends with exit code 2 and one line of reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="roundelrun",
        usage="roundelrun -np N [options] [--] command [argument ...]",
        description="Start N processes (ranks) of a command on this host and look after them.",
        epilog="Every rank finds its place in ROUNDEL_RANK, ROUNDEL_SIZE, ROUNDEL_LOCAL_RANK and ROUNDEL_LOCAL_SIZE. "
        "Where they are not set, OMP_NUM_THREADS becomes cores / N and PYTHONUNBUFFERED becomes 1 (so that a rank's "
        "last lines are not lost with it). The exit code is 0, or that of the rank that failed first "
        "(128 + number for a signal). " + EXAMPLE,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-np", "-n", dest="size", metavar="N", type=int, help="the number of ranks")
    add("--grace", metavar="SECONDS", type=seconds(0), default=5.0,
        help="after a rank's failure or Ctrl-C: time for the others to end by themselves (default 5)")  # fmt: skip
    add("--output-dir", metavar="DIR", help="also write each rank's output to DIR/rank.N.out and DIR/rank.N.err")
    add("--no-prefix", dest="prefix", action="store_false", help="hand output on as it is, without '[rank]<stdout>: '")
    add("--start-timeout", metavar="SECONDS", type=seconds(), help="time for all ranks to meet (ROUNDEL_START_TIMEOUT)")
    add("--timeout", metavar="SECONDS", type=seconds(), help="time limit of one operation (ROUNDEL_TIMEOUT)")
    add("--transport", choices=("auto", "shm", "tcp"), help="how ranks exchange data (ROUNDEL_TRANSPORT)")
    add("--verbose", action="store_true", help="say what is started and set")
    add("--version", action="version", version=f"roundelrun {version()}")
    add("command", nargs=argparse.REMAINDER, help="what every rank runs")
    given = parser.parse_args(argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if given.size is None:
        parser.error(f"-np N (the number of ranks) is missing; {EXAMPLE}")
    if given.size < 1:
        parser.error(f"-np must be at least 1, not {given.size}; {EXAMPLE}")
    if not command or not command[0]:
        parser.error(f"the command is missing; {EXAMPLE}")
    env = {
        "ROUNDEL_SIZE": str(given.size),
        "ROUNDEL_LOCAL_SIZE": str(given.size),
        "ROUNDEL_START_TIMEOUT": given.start_timeout and f"{given.start_timeout:.12g}",
        "ROUNDEL_TIMEOUT": given.timeout and f"{given.timeout:.12g}",
        "ROUNDEL_TRANSPORT": given.transport,
        "PYTHONUNBUFFERED": None if "PYTHONUNBUFFERED" in os.environ else "1",
        "OMP_NUM_THREADS": None if "OMP_NUM_THREADS" in os.environ else str(max(1, cores() // given.size)),
    }
    env = {name: value for name, value in env.items() if value is not None}
    return Options(given.size, command, given.grace, given.output_dir, given.prefix, given.verbose, env)


def cores() -> int:
    """Those that this process may use: a container or taskset can have taken some away."""
    return len(os.sched_getaffinity(0))


def seconds(least: float | None = None) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, or from `least` on."""

    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
        return value

    return convert
