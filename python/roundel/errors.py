"""The errors that a job can meet. All derive from RoundelError; the texts name ranks and operations."""

from __future__ import annotations

import builtins

__all__ = [
    "CorruptFrameError",
    "DuplicateNameError",
    "FencedError",
    "HandshakeError",
    "InvalidArgumentError",
    "MismatchError",
    "PeerLostError",
    "RoundelError",
    "TimeoutError",
]


class RoundelError(RuntimeError):
    """Base of all errors that the library raises."""


class InvalidArgumentError(RoundelError, ValueError):
    """An argument or setting is wrong: the text says what was expected and what came. Nothing has been changed."""


class PeerLostError(RoundelError):
    """A rank died, left or cannot be reached.

    ranks: tuple of the lost global ranks, ascending.
    epoch: the job's epoch in which they were lost.
    op: the operation during which it was noticed, such as "all-reduce 'fc.weight' (operation 17)".
    """

    def __init__(self, text: str, ranks: tuple[int, ...] = (), epoch: int = 0, op: str = "") -> None:
        super().__init__(text)
        self.ranks = tuple(ranks)
        self.epoch = epoch
        self.op = op

    def __reduce__(self):
        return type(self), (self.args[0], self.ranks, self.epoch, self.op)


class MismatchError(RoundelError):
    """Ranks called different operations, or the same one with different shapes, dtypes, roots or names."""


class DuplicateNameError(RoundelError):
    """A request of this name is under way on this rank already; nothing was started."""


class CorruptFrameError(RoundelError):
    """Bytes changed on their way, or somebody sent garbage. No result has become visible."""


class TimeoutError(RoundelError, builtins.TimeoutError):
    """A deadline passed (ROUNDEL_TIMEOUT, or the call's own); the text names the ranks waited for."""


class HandshakeError(RoundelError):
    """The other end does not know the job's token, belongs to another job, or speaks another version."""


class FencedError(RoundelError):
    """This rank is no longer part of its job: it was silent for ROUNDEL_DEAD_SECONDS, stopped or cut off.

    The others go on, or have ended, without it; it must end, or call shutdown() before init().
    """
