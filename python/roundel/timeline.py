"""Merges timelines of ranks, and torch.profiler's traces, into one trace: `roundel timeline A.json B.json -o all.json`.

Both count microseconds from some moment of unix time that the file names (`baseTimeNanoseconds`); merged, all count from the
second in which the first event lies. A file that was cut off (its process was killed) is read up to its last whole line. Ranks
of Roundel keep their numbers as processes; processes of other traces get numbers of their own behind them.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Trace", "load", "main", "merge"]

FOREIGN_PROCESSES = 1_000_000  # numbers of processes that are not ranks start here
FLOWS_PER_FILE = 1 << 32  # ids of flows (arrows) are unique within a file only


@dataclass
class Trace:
    """One file: its events, with times in microseconds since `base_ns`, nanoseconds of unix time."""

    path: Path
    events: list[dict]
    base_ns: int = 0
    cut_off: bool = False
    rank: int | None = None  # of a torch.profiler trace, where it says so
    ranks: set[int] = field(default_factory=set)  # of a timeline of Roundel's

    @property
    def foreign(self) -> bool:
        """Whether it is not one of Roundel's."""
        return not self.ranks

    def describe(self) -> str:
        """One line about it."""
        whose = ", ".join(f"rank {r}" for r in sorted(self.ranks)) or (
            f"torch, rank {self.rank}" if self.rank is not None else "other"
        )
        timed = sum(e.get("ph") in ("X", "i") for e in self.events)
        dropped = sum(e.get("args", {}).get("dropped", 0) for e in self.events if e.get("name") == "timeline ends")
        notes = [f"{timed} events"] + ([f"{dropped} dropped"] if dropped else []) + (["cut off"] if self.cut_off else [])
        return f"{self.path} ({whose}): {', '.join(notes)}"


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", errors="replace")


def _whole_lines(text: str) -> list[dict]:
    """The events of an array that has a line for each and may end anywhere."""
    events = []
    for line in text.split("\n")[1:]:
        line = line.strip().removesuffix(",")
        if line in ("", "]"):
            continue
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def load(path: Path) -> Trace:
    """Read a trace. Raises ValueError when it is none, OSError when it cannot be read."""
    text = _read(path)
    try:
        content = json.loads(text)
        cut_off = False
    except ValueError as error:
        if not text.startswith("["):
            raise ValueError(f"{path} is no trace: {error}") from error
        content, cut_off = _whole_lines(text), True
    if isinstance(content, dict) and isinstance(content.get("traceEvents"), list):
        trace = Trace(path, content["traceEvents"], int(content.get("baseTimeNanoseconds", 0)))
        trace.rank = content.get("distributedInfo", {}).get("rank")
    elif isinstance(content, list):
        trace = Trace(path, content, cut_off=cut_off)
    else:
        raise ValueError(f"{path} is no trace: neither a list of events nor an object with traceEvents")
    if not all(isinstance(e, dict) for e in trace.events):
        raise ValueError(f"{path} is no trace: an event is not an object")
    for event in trace.events:
        arguments = event.get("args", {})
        if event.get("name") == "process_name" and arguments.get("name") == f"rank {event.get('pid')}":
            trace.ranks.add(event["pid"])
        if isinstance(content, list) and "baseTimeNanoseconds" in arguments:
            trace.base_ns = arguments["baseTimeNanoseconds"]
    return trace


def _shifted(event: dict, by_us: float) -> dict:
    """The event `by_us` microseconds earlier. Nanoseconds survive: both are below 2**53 thousandths."""
    if event.get("ph") == "M" or "ts" not in event:
        return {k: v for k, v in event.items() if k != "ts"}
    return event | {"ts": round(float(event["ts"]) - by_us, 3)}


def merge(traces: list[Trace]) -> dict:
    """One trace of all, as the object that torch.profiler writes. Times count from the second in which the first event lies."""
    first = min(
        (t.base_ns / 1e3 + float(e["ts"]) for t in traces for e in t.events if "ts" in e and e.get("ph") != "M"), default=0
    )
    base_ns = int(first // 1_000_000) * 1_000_000_000
    events: list[dict] = []
    kept = {e["pid"] for t in traces if not t.foreign for e in t.events if isinstance(e.get("pid"), int)}
    numbers = (n for n in itertools.count(FOREIGN_PROCESSES) if n not in kept)
    foreign: dict[tuple[int, object], int] = {}
    for number, trace in enumerate(traces):
        by_us = (base_ns - trace.base_ns) // 1000
        for event in trace.events:
            event = _shifted(event, by_us)
            if trace.foreign and "pid" in event:
                key = (number, event["pid"])
                if key not in foreign:
                    foreign[key] = next(numbers)
                event["pid"] = foreign[key]
                if event.get("name") == "process_sort_index":
                    continue
            if isinstance(event.get("id"), int):
                event["id"] += number * FLOWS_PER_FILE
            if event.get("name") == "process_name" and trace.foreign:
                whose = f"rank {trace.rank}" if trace.rank is not None else trace.path.name
                event["args"] = event.get("args", {}) | {"name": f"{event.get('args', {}).get('name', '')} ({whose})"}
            events.append(event)
    return {"displayTimeUnit": "ms", "baseTimeNanoseconds": base_ns, "traceEvents": events}


def main(argv: list[str] | None = None) -> int:
    """Merge the files into one and say what was in each. Returns 0, or 2 when a file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="roundel timeline", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="timelines, or traces of torch.profiler; also .gz")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="where to write; gzipped if it ends in .gz"
    )
    options = parser.parse_args(argv)
    try:
        traces = [load(path) for path in options.paths]
        text = json.dumps(merge(traces), separators=(",", ":"))
        data = text.encode()
        options.output.write_bytes(gzip.compress(data) if options.output.suffix == ".gz" else data)
    except (OSError, ValueError) as error:
        print(f"roundel timeline: {error}", file=sys.stderr)
        return 2
    for trace in traces:
        print(trace.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
