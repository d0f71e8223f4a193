"""roundelrun's command line: its own options, and horovodrun's (horovodrun.py)."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import os
import socket
import sys
from collections.abc import Callable

from . import horovodrun
from .build import build_report
from .config import ConfigError, flags_of
from .hosts import HostsError, check_hosts, hosts_of_file, hosts_of_list

EXAMPLE = "example: roundelrun -np 4 python train.py"


@dataclasses.dataclass(frozen=True)
class Options:
    size: int
    command: list[str]
    grace: float
    output_dir: str | None
    rank_files: tuple[str, str]  # of stdout and stderr in output_dir, with {rank}
    prefix: bool
    timestamps: bool
    verbose: bool
    env: dict[str, str]  # set in every rank, apart from what differs between ranks
    notes: list[str]  # what to say before the start


def version() -> str:
    try:
        return importlib.metadata.version("roundel")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown (not installed)"


def parse(argv: list[str] | None) -> Options:
    """Options from the command line; ends with exit code 2 and one line of reason when it makes no sense."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    given = parse_all(parser, argv)
    if given.config_file is not None:
        given = parse_all(parser, config_flags(parser, given.config_file) + argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if given.size is None:
        parser.error(f"-np N (the number of ranks) is missing; {EXAMPLE}")
    if given.size < 1:
        parser.error(f"-np must be at least 1, not {given.size}; {EXAMPLE}")
    if given.timestamps and not given.prefix:
        parser.error("--prefix-output-with-timestamp and --no-prefix contradict each other")
    if not command or not command[0]:
        parser.error(f"the command is missing; {EXAMPLE}")
    try:
        if given.hosts is not None or given.hostfile is not None:
            hosts = hosts_of_list(given.hosts) if given.hosts is not None else hosts_of_file(given.hostfile)
            check_hosts(hosts, given.size)
    except HostsError as error:
        parser.error(f"{'--hosts' if given.hosts is not None else '--hostfile'}: {error}")
    width = len(str(given.size - 1))
    theirs = (f"rank.{{rank:0{width}d}}/stdout", f"rank.{{rank:0{width}d}}/stderr")
    return Options(
        size=given.size,
        command=command,
        grace=given.grace,
        output_dir=given.output_dir or given.output_filename,
        rank_files=theirs if given.output_filename else ("rank.{rank}.out", "rank.{rank}.err"),
        prefix=given.prefix,
        timestamps=given.timestamps,
        verbose=given.verbose,
        env=environment(given),
        notes=horovodrun.notes(given),
    )


class CheckBuild(argparse.Action):
    """Prints and ends, whatever else is given, as --version does."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(build_report(version()))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="roundelrun",
        usage="roundelrun -np N [options] [--] command [argument ...]",
        description="Start N processes (ranks) of a command on this host and look after them.",
        epilog="horovodrun's other flags are taken too: docs/horovod.md tells what each does. "
        "Every rank finds its place in ROUNDEL_RANK, ROUNDEL_SIZE, ROUNDEL_LOCAL_RANK and ROUNDEL_LOCAL_SIZE, and under "
        "the same names with HOROVOD_. Where they are not set, OMP_NUM_THREADS becomes cores / N and PYTHONUNBUFFERED "
        "becomes 1 (so that a rank's last lines are not lost with it). The exit code is 0, or that of the rank that "
        "failed first (128 + number for a signal). " + EXAMPLE,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-np", "-n", "--num-proc", dest="size", metavar="N", type=int, help="the number of ranks")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-H", "--hosts", metavar="HOST:SLOTS,...", help="where the ranks run: this host, and how many at most")
    where.add_argument("-hostfile", "--hostfile", metavar="FILE", help="the same from lines 'HOST slots=N'")
    add("--grace", metavar="SECONDS", type=seconds(0), default=5.0,
        help="after a rank's failure or Ctrl-C: time for the others to end by themselves (default 5)")  # fmt: skip
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--output-dir", metavar="DIR", help="also write each rank's output to DIR/rank.N.out and DIR/rank.N.err")
    files.add_argument("--output-filename", metavar="DIR", help="the same as DIR/rank.N/stdout and DIR/rank.N/stderr")
    add("--no-prefix", dest="prefix", action="store_false", help="hand output on as it is, without '[rank]<stdout>: '")
    add("-prefix-timestamp", "--prefix-output-with-timestamp", dest="timestamps", action="store_true",
        help="the time before each line of output")  # fmt: skip
    add("--start-timeout", metavar="SECONDS", type=seconds(), help="time for all ranks to meet (ROUNDEL_START_TIMEOUT)")
    add("--timeout", metavar="SECONDS", type=seconds(), help="time limit of one operation (ROUNDEL_TIMEOUT)")
    add("--transport", choices=("auto", "shm", "tcp", "shm+tcp"), help="how ranks exchange data (ROUNDEL_TRANSPORT)")
    add("--config-file", metavar="FILE", help="options from horovodrun's YAML; those of the command line go before them")
    add("-cb", "--check-build", action=CheckBuild, nargs=0, help="print what was built and found, and end")
    add("--verbose", action="store_true", help="say what is started and set")
    add("-v", "--version", action="version", version=f"roundelrun {version()}")
    horovodrun.add_flags(parser)
    add("command", nargs=argparse.REMAINDER, help="what every rank runs")
    return parser


def parse_all(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """As parse_args(), which for an unknown option names what argparse takes for its value as well."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(option, [name for action in parser._actions for name in action.option_strings], 1)
        parser.error(
            f"unknown option {option}{f'; did you mean {near[0]}?' if near else ''} "
            "(the command's own options come after the command)"
        )
    return given


def config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """What --config-file stands for; a value that a flag does not take is refused with the file's name."""
    try:
        with open(path, encoding="utf-8") as file:
            flags = flags_of(file.read())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        parser.error(f"--config-file {path}: {error}")
    checker = make_parser()
    checker.error = lambda message: parser.error(f"--config-file {path}: {message}")
    checker.parse_args(flags)
    return flags


def environment(given: argparse.Namespace) -> dict[str, str]:
    """What all ranks get alike."""
    env = {
        "ROUNDEL_SIZE": str(given.size),
        "ROUNDEL_LOCAL_SIZE": str(given.size),
        # For scripts that read them before they call init().
        "HOROVOD_SIZE": str(given.size),
        "HOROVOD_LOCAL_SIZE": str(given.size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_HOSTNAME": socket.gethostname(),
        **horovodrun.settings(given),
        "ROUNDEL_START_TIMEOUT": given.start_timeout and f"{given.start_timeout:.12g}",
        "ROUNDEL_TRANSPORT": given.transport,
        "PYTHONUNBUFFERED": None if "PYTHONUNBUFFERED" in os.environ else "1",
        "OMP_NUM_THREADS": None if "OMP_NUM_THREADS" in os.environ else str(max(1, cores() // given.size)),
    }
    if given.timeout:
        env["ROUNDEL_TIMEOUT"] = f"{given.timeout:.12g}"
    return {name: value for name, value in env.items() if value is not None}


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
