"""Reads the flight records of a job's ranks and says where they part: `python -m roundel.flight DIRECTORY or FILES...`.

Records are written by ranks whose communicator failed, when ROUNDEL_FLIGHT_RECORD=PREFIX is set: one file PREFIX.rank3.json per
rank, a head line and a line for each of its last 256 operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Record", "compare", "load", "main"]

POINT_TO_POINT = 1 << 63  # sequence numbers above it count transfers between two ranks


@dataclass(frozen=True)
class Record:
    """What one rank has written: its head, and its collectives by number."""

    rank: int
    size: int
    why: str
    collectives: dict[int, dict]

    @property
    def last(self) -> int:
        """The number of the last collective it called; 0 for none."""
        return max(self.collectives, default=0)


def load(paths: list[Path]) -> list[Record]:
    """Records from files, or from all *.rank<N>.json of directories, by rank. Raises ValueError for anything else."""
    files = [f for p in paths for f in (sorted(p.glob("*.rank*.json")) if p.is_dir() else [p])]
    records = []
    for file in files:
        try:
            head, *entries = [json.loads(line) for line in file.read_text().splitlines()]
            newest = max((e["epoch"] for e in entries), default=0)
            collectives = {
                e["sequence"]: e for e in entries if e["sequence"] < POINT_TO_POINT and e["epoch"] == newest and e["group"] == 0
            }
            records.append(Record(head["rank"], head["size"], head["why"], collectives))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no flight record: {error}") from error
    return sorted(records, key=lambda r: r.rank)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _called(entry: dict) -> str:
    name = f" '{entry['name']}'" if entry["name"] else ""
    return f"{entry['what']}{name}"


def compare(records: list[Record]) -> list[str]:
    """What differs between the ranks, in sentences; empty when nothing does."""
    findings = []
    missing = sorted(set(range(records[0].size)) - {r.rank for r in records})
    if missing:
        findings.append(f"{_ranks(missing)} left no record: killed, or its communicator did not fail")
    for number in sorted(set.intersection(*(set(r.collectives) for r in records))):
        kinds: dict[str, list[int]] = {}
        for r in records:
            kinds.setdefault(_called(r.collectives[number]), []).append(r.rank)
        if len(kinds) > 1:
            said = "; ".join(f"{_ranks(ranks)} called {what}" for what, ranks in kinds.items())
            findings.append(f"operation {number} differs: {said}")
            break
    front = max(r.last for r in records)
    at_front = [r for r in records if r.last == front]
    for r in records:
        if r.last < front:
            ahead = at_front[0].collectives[front]
            findings.append(
                f"{_ranks([r.rank])} has come to operation {r.last} only; {_ranks([a.rank for a in at_front])} called "
                f"operation {front}, {_called(ahead)}"
            )
    for r in records:
        for number, e in sorted(r.collectives.items()):
            if e["state"] != "done":
                waits = f", waiting for {_ranks(e['waiting_for'])}" if e["waiting_for"] else ""
                findings.append(f"rank {r.rank}: operation {number}, {_called(e)}, is {e['state']}{waits}")
                break
    return findings


def main(argv: list[str] | None = None) -> int:
    """Print what the records say. Returns 0 when the ranks agree, 1 when they do not, 2 when there is nothing to read."""
    parser = argparse.ArgumentParser(prog="roundel flight", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="directories or files of flight records")
    options = parser.parse_args(argv)
    try:
        records = load(options.paths)
    except (OSError, ValueError) as error:
        print(f"roundel flight: {error}", file=sys.stderr)
        return 2
    if not records:
        print("roundel flight: no files named *.rank<N>.json", file=sys.stderr)
        return 2
    for r in records:
        print(f"rank {r.rank}: {len(r.collectives)} collectives, the last is operation {r.last}; it failed with: {r.why}")
    findings = compare(records)
    print("\n".join(findings) if findings else "all ranks called the same operations")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
