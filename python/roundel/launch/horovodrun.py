"""The flags of horovodrun 0.28, a row each: what it does here, and how. roundelrun's parser and docs/horovod.md are made of it.

A flag of kind SETTING sets a variable of the core's table in every rank; IGNORED is accepted, and a note says why nothing
follows from it; REFUSED ends with the reason; OWN is an option of roundelrun itself (options.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Callable, Iterator

__all__ = ["FLAGS", "Flag", "Kind", "add_flags", "notes", "settings"]


class Kind(enum.Enum):
    OWN = "same"
    SETTING = "same, as a setting"
    IGNORED = "no effect"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class Flag:
    """names: horovodrun's. does: what it does here, or why not. takes: what follows it, a word for each; empty for a switch.

    SETTING only: `variable` becomes value(what was given). off: a switch's opposites.
    """

    kind: Kind
    names: tuple[str, ...]
    does: str
    takes: str = ""
    variable: str = ""
    type: Callable[[str], object] = str
    value: Callable[[object], str] = str
    off: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        return "horovodrun" + self.names[-1].replace("-", "_")


def whole(text: str) -> int:
    """An argparse type: a whole number from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error", "FATAL": "error"}


def level(text: str) -> str:
    """An argparse type: one of horovodrun's log levels, as ours."""
    if text.upper() not in LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(LEVELS)}")
    return LEVELS[text.upper()]


FIXED_SIZE = "a job's number of ranks does not change while it runs (growing and shrinking come later)"
NO_MPI = "no mpirun is started"
NO_TUNER = "there are no parameters that are tuned while the job runs"
BY_COST = "the cheapest algorithm is chosen for each call"
OWN_CONTROLLER = "there is one controller, Roundel's own, that needs neither gloo nor MPI"

FLAGS = (
    Flag(Kind.OWN, ("-np", "--num-proc"), "the number of ranks", "N"),
    Flag(Kind.OWN, ("-v", "--version"), "prints roundelrun's version"),
    Flag(Kind.OWN, ("-cb", "--check-build"), "prints what was built and found, in horovodrun's form"),
    Flag(Kind.OWN, ("-H", "--hosts"), "slots on this host; ranks elsewhere are refused, with what to use instead", "HOSTS"),
    Flag(Kind.OWN, ("-hostfile", "--hostfile"), "the same from a file with lines `HOST slots=N`", "FILE"),
    Flag(Kind.OWN, ("--start-timeout",), "time for all ranks to meet (`ROUNDEL_START_TIMEOUT`)", "SECONDS"),
    Flag(Kind.OWN, ("--verbose",), "says what is started and set"),
    Flag(Kind.OWN, ("--config-file",), "YAML with horovodrun's keys; the command line goes before it", "FILE"),
    Flag(Kind.OWN, ("--output-filename",), "also writes DIR/rank.N/stdout and DIR/rank.N/stderr", "DIR"),
    Flag(Kind.OWN, ("-prefix-timestamp", "--prefix-output-with-timestamp"), "the time before each line of output"),
    Flag(Kind.SETTING, ("--fusion-threshold-mb",), "the most that named tensors make up together; 0: each travels alone", "MB",
         "ROUNDEL_FUSION_THRESHOLD", whole, "{}M".format),
    Flag(Kind.SETTING, ("--timeline-filename",), "each rank writes FILE.rankN.json (of FILE without a `.json`)", "FILE",
         "ROUNDEL_TIMELINE", str, lambda path: str(path).removesuffix(".json")),
    Flag(Kind.SETTING, ("--timeline-mark-cycles",), "marks in the timeline when batches of tensors were agreed on",
         variable="ROUNDEL_TIMELINE_MARK_CYCLES", value=lambda _: "1", off=("--no-timeline-mark-cycles",)),
    Flag(Kind.SETTING, ("--stall-check-warning-time-seconds",), "when a warning says which ranks a tensor waits for", "SECONDS",
         "ROUNDEL_STALL_CHECK_SECONDS", whole),
    Flag(Kind.SETTING, ("--no-stall-check",), "no such warning; goes before the time of it",
         variable="ROUNDEL_STALL_CHECK_SECONDS", value=lambda _: "0", off=("--stall-check",)),
    Flag(Kind.SETTING, ("--stall-check-shutdown-time-seconds",), "when a stalled job ends with an error; 0: never", "SECONDS",
         "ROUNDEL_STALL_SHUTDOWN_SECONDS", whole),
    Flag(Kind.SETTING, ("--gloo-timeout-seconds",), "time limit of one operation", "SECONDS", "ROUNDEL_TIMEOUT", whole),
    Flag(Kind.SETTING, ("--log-level",), "TRACE counts as debug, FATAL as error", "LEVEL", "ROUNDEL_LOG_LEVEL", level),
    Flag(Kind.SETTING, ("--network-interfaces", "--network-interface"), "where ranks meet over TCP; of several the first",
         "NAMES", "ROUNDEL_INTERFACE", str, lambda names: str(names).partition(",")[0]),
    Flag(Kind.IGNORED, ("--cycle-time-ms",), "there is no cycle: tensors travel as soon as all ranks have them", "MS"),
    Flag(Kind.IGNORED, ("--cache-capacity",), "every name is remembered, there is nothing to size", "N"),
    Flag(Kind.IGNORED, ("--disable-cache",), "roundelrun makes no checks that it would remember"),
    Flag(Kind.IGNORED, ("-p", "--ssh-port"), "all ranks are started on this host, without ssh", "PORT"),
    Flag(Kind.IGNORED, ("-i", "--ssh-identity-file"), "all ranks are started on this host, without ssh", "FILE"),
    Flag(Kind.IGNORED, ("--hierarchical-allreduce", "--no-hierarchical-allreduce"), BY_COST),
    Flag(Kind.IGNORED, ("--hierarchical-allgather", "--no-hierarchical-allgather"), BY_COST),
    Flag(Kind.IGNORED, ("--autotune", "--no-autotune"), NO_TUNER),
    Flag(Kind.IGNORED, ("--autotune-log-file",), NO_TUNER, "FILE"),
    Flag(Kind.IGNORED, ("--autotune-warmup-samples",), NO_TUNER, "N"),
    Flag(Kind.IGNORED, ("--autotune-steps-per-sample",), NO_TUNER, "N"),
    Flag(Kind.IGNORED, ("--autotune-bayes-opt-max-samples",), NO_TUNER, "N"),
    Flag(Kind.IGNORED, ("--autotune-gaussian-process-noise",), NO_TUNER, "X"),
    Flag(Kind.IGNORED, ("--gloo",), OWN_CONTROLLER),
    Flag(Kind.IGNORED, ("--mpi",), OWN_CONTROLLER),
    Flag(Kind.IGNORED, ("--tcp",), "between hosts it is TCP; `--transport tcp` makes it so inside a host too"),
    Flag(Kind.IGNORED, ("--mpi-threads-disable", "--no-mpi-threads-disable"), NO_MPI),
    Flag(Kind.IGNORED, ("--mpi-args",), NO_MPI, "ARGUMENTS"),
    Flag(Kind.IGNORED, ("--binding-args",), "processes are not bound to cores", "ARGUMENTS"),
    Flag(Kind.IGNORED, ("--thread-affinity",), "threads are not bound to cores", "N"),
    Flag(Kind.IGNORED, ("--num-nccl-streams",), "collectives do not go through NCCL yet", "N"),
    Flag(Kind.IGNORED, ("--log-with-timestamp", "--no-log-hide-timestamp"),
         "log lines have no time; --prefix-output-with-timestamp has"),
    Flag(Kind.IGNORED, ("--log-without-timestamp", "--log-hide-timestamp"), "log lines have no time"),
    Flag(Kind.REFUSED, ("--jsrun",), "jsrun is not supported: start one roundelrun, or torchrun on each host"),
    Flag(Kind.REFUSED, ("--min-np", "--min-num-proc"), FIXED_SIZE, "N"),
    Flag(Kind.REFUSED, ("--max-np", "--max-num-proc"), FIXED_SIZE, "N"),
    Flag(Kind.REFUSED, ("--slots-per-host",), FIXED_SIZE, "N"),
    Flag(Kind.REFUSED, ("--elastic-timeout",), FIXED_SIZE, "SECONDS"),
    Flag(Kind.REFUSED, ("--reset-limit",), FIXED_SIZE, "N"),
    Flag(Kind.REFUSED, ("--blacklist-cooldown-range",), FIXED_SIZE, "MIN MAX"),
    Flag(Kind.REFUSED, ("--host-discovery-script",), FIXED_SIZE, "FILE"),
)  # fmt: skip


class Refuse(argparse.Action):
    """Ends with the reason why the flag is not taken, whether or not a value follows."""

    def __init__(self, reason: str, **options) -> None:
        super().__init__(nargs="?", **options)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: {self.reason}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All rows that are not the parser's own options. They are left out of its help, which would be twice as long."""
    for flag in FLAGS:
        hidden = {"dest": flag.dest, "help": argparse.SUPPRESS}
        if flag.kind is Kind.REFUSED:
            parser.add_argument(*flag.names, action=Refuse, reason=flag.does, **hidden)
        elif flag.kind is Kind.IGNORED and not flag.takes:
            parser.add_argument(*flag.names, action="store_true", **hidden)
        elif flag.kind is Kind.SETTING and not flag.takes:
            parser.add_argument(*flag.names, action="store_true", default=None, **hidden)
            parser.add_argument(*flag.off, action="store_false", default=None, **hidden)
        elif flag.kind is not Kind.OWN:
            parser.add_argument(*flag.names, type=flag.type, metavar=flag.takes, **hidden)


def given(values: argparse.Namespace, *kinds: Kind) -> Iterator[tuple[Flag, object]]:
    for flag in FLAGS:
        value = getattr(values, flag.dest, None)
        if flag.kind in kinds and value is not None and value is not False:
            yield flag, value


def settings(values: argparse.Namespace) -> dict[str, str]:
    """The variables that the flags of kind SETTING set."""
    return {flag.variable: flag.value(value) for flag, value in given(values, Kind.SETTING)}


def notes(values: argparse.Namespace) -> list[str]:
    """A line for each flag that was accepted without effect."""
    return [f"note: {flag.names[-1]} has no effect: {flag.does}" for flag, _ in given(values, Kind.IGNORED)]
