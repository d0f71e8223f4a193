"""Handles of operations under way, and what turns the core's result into the caller's arrays or tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from roundel.errors import InvalidArgumentError

__all__ = ["Handle", "poll", "synchronize", "waits_for"]


class Handle:
    """An operation under way; `finish` turns the core's result into what the caller gets."""

    __slots__ = ("__weakref__", "_finish", "_native", "_result")

    def __init__(self, native: Any, finish: Callable[[Any], Any]) -> None:
        self._native = native
        self._finish: Callable[[Any], Any] | None = finish

    def done(self) -> bool:
        """True when wait() would not block."""
        return self._native.done()

    def wait(self) -> Any:
        """The result; may be called again. Raises MismatchError, PeerLostError, TimeoutError."""
        finish = self._finish  # another thread may wait too
        if finish is not None:
            self._result = finish(self._native.wait())
            self._finish = None
        return self._result


def _check(handle: object, what: str) -> Handle:
    if not isinstance(handle, Handle):
        raise InvalidArgumentError(f"{what}: expected a handle of an asynchronous operation, got {type(handle).__name__}")
    return handle


def poll(handle: Handle) -> bool:
    """True when synchronize(handle) would not block."""
    return _check(handle, "poll").done()


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous operation and return its result: what the synchronous form returns (alltoall: always a pair)."""
    return _check(handle, "synchronize").wait()


def waits_for(start: Callable[..., Handle], name: str, doc: str) -> Callable[..., Any]:
    """The synchronous form of an asynchronous operation, with the same arguments."""

    @functools.wraps(start)
    def call(*args, **kwargs):
        return start(*args, **kwargs).wait()

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    call.__annotations__ = {key: value for key, value in start.__annotations__.items() if key != "return"}
    return call
