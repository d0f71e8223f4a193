"""Running a training function so that it goes back to the last commit and on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from roundel.elastic.state import State
from roundel.errors import (
    CorruptFrameError,
    FencedError,
    HorovodInternalError,
    HostsUpdatedInterrupt,
    MismatchError,
    PeerLostError,
    TimeoutError,
)

__all__ = ["run_fn"]

# These end the job, or would come again: a job that keeps its size cannot go on by repeating.
_FINAL = (CorruptFrameError, FencedError, MismatchError, PeerLostError, TimeoutError)


def run_fn(func: Callable[..., Any], reset: Callable[[], None]) -> Callable[..., Any]:
    """func(state, ...) made to start from rank 0's state, and to go back to the last commit and start again.

    HorovodInternalError: the state is restored, reset() and the state's reset callbacks are called, and func runs again.
    Where it is PeerLostError, TimeoutError, CorruptFrameError or FencedError, which end the job, or MismatchError, which
    would come again, the state is restored and the error raised.
    HostsUpdatedInterrupt: the same without going back; the state is not synchronized again if hosts were only removed.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        skip_sync = False
        while True:
            try:
                if not skip_sync:
                    state.sync()
                return func(state, *args, **kwargs)
            except _FINAL:
                state.restore()
                raise
            except HorovodInternalError:
                state.restore()
                skip_sync = False
            except HostsUpdatedInterrupt as interrupt:
                skip_sync = interrupt.skip_sync
            reset()
            state.on_reset()

    return wrapper
