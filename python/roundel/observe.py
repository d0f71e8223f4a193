"""What the engine has done so far, in numbers and as a timeline; docs/timeline.md."""

from __future__ import annotations

from typing import Any

from roundel.world import engine

__all__ = ["reset_stats", "start_timeline", "stats", "stop_timeline"]


def stats() -> dict[str, Any]:
    """Counters of this rank, since init() or reset_stats().

    "kinds": by kind of request ("allreduce", ...) a dict of requests, tensors, bytes (on this rank), batches (collectives
    run), fused (tensors that shared one), failed, and negotiate_seconds, queue_seconds, execute_seconds, summed over requests.
    "waited_for": by rank, how often it was the last to become ready ("requests"), and how long this rank's requests had waited
    by then ("seconds"). "seconds": since when this counts. Raises RoundelError before init().
    """
    return engine().stats()


def reset_stats() -> None:
    """Count from here."""
    engine().reset_stats()


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Write what happens to every tensor from here on to a Chrome trace, one file for each rank.

    file_path: {rank} in it becomes the rank's number; without, the number goes before the extension.
    mark_cycles: also mark each batch that the engine executes. Raises InvalidArgumentError (it cannot be written, or is on
    already), RoundelError before init().
    """
    engine().start_timeline(file_path, mark_cycles)


def stop_timeline() -> None:
    """Finish the file of start_timeline()."""
    engine().stop_timeline()
