"""Ranks that have joined go on serving the steps of the one DistributedOptimizer whose buckets bypass the engine.

The engine stands in for joined ranks by itself. Planned buckets are ordered collectives of the job's communicator, so a rank in
join() takes part in them with empty gradients. The order must be known, so at most one optimizer is served this way: the one
that was planned last while no other was in use, on every rank the same; all others reduce through the engine.
"""

from __future__ import annotations

import gc
import weakref
from typing import Protocol

from roundel.errors import RoundelError
from roundel.world import rank

__all__ = ["is_free", "require_no_step", "serve_until_all_have_joined", "take", "watch"]


class Served(Protocol):
    """What join() needs of an optimizer's reducer."""

    handed_over: bool
    close: weakref.finalize

    def in_use(self) -> bool: ...

    def serve_step(self) -> bool: ...


_served: weakref.ref[Served] | None = None
_all: weakref.WeakSet[Served] = weakref.WeakSet()


def _current() -> Served | None:
    served = _served() if _served is not None else None
    return served if served is not None and served.in_use() else None


def is_free(newcomer: Served) -> bool:
    """No other reducer's buckets bypass the engine, as far as this rank can tell."""
    return _current() in (None, newcomer)


def take(newcomer: Served) -> None:
    """From now on this is the one; all ranks agreed on it, whatever they know of the one before."""
    global _served
    _served = weakref.ref(newcomer)


def watch(newcomer: Served) -> None:
    """Every reducer, served or not: see require_no_step()."""
    _all.add(newcomer)


def require_no_step() -> None:
    """Raise RoundelError between backward() and step()."""
    # Optimizers that nobody holds any more are gone on all ranks alike from here on: else one rank would serve what another
    # has forgotten.
    gc.collect()
    if any(each.handed_over and each.close.alive for each in _all):
        raise RoundelError(f"rank {rank()}: join() between backward() and step(): the others' step needs this rank's gradients")


def serve_until_all_have_joined() -> int:
    """Take part in the others' steps without gradients of one's own, up to the one in which every rank has joined.

    Returns in how many steps; 0 where there is nothing to serve, on all ranks.
    """
    served, steps = _current(), 0
    while served is not None:
        steps += 1
        if served.serve_step():
            break
    return steps
