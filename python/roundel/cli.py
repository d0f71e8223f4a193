"""`roundel`: what this installation is and finds on this machine; a reader of flight records, a merger of timelines."""

from __future__ import annotations

import argparse
import json
import platform
import sys

from roundel.launch.options import version


def main(argv: list[str] | None = None) -> int:
    """The entry point of `roundel`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="roundel", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"roundel {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="version, platform, instruction set, transports, what was found of CUDA, NCCL, MPI",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    flight = commands.add_parser(
        "flight", allow_abbrev=False, help="read the flight records of a job's ranks and say where they part", add_help=False
    )
    flight.add_argument("rest", nargs=argparse.REMAINDER)
    timeline = commands.add_parser(
        "timeline", allow_abbrev=False, help="merge timelines and profiler traces into one", add_help=False
    )
    timeline.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.command == "timeline":
        from roundel.timeline import main as merge_timelines

        return merge_timelines(options.rest)
    if options.command == "flight":
        from roundel.flight import main as read_records

        return read_records(options.rest)
    return print_info(options.json)


def print_info(as_json: bool) -> int:
    """Print what this installation is, and what the core was built with and finds, as aligned rows or as JSON."""
    try:
        from roundel import _core  # here, so that --version and --help answer even when the core does not load
    except ImportError as error:
        print(f"roundel: the compiled core cannot be loaded: {error}", file=sys.stderr)
        return 1
    info = {
        "version": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_core.info([f"{sys.prefix}/lib"]),
    }
    if as_json:
        print(json.dumps(info, indent=2))
        return 0
    width = max(map(len, info), default=0)
    for name, value in info.items():
        print(f"{name:<{width}}  {value}")
    return 0
