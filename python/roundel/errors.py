"""The errors that a job can meet. All derive from RoundelError; the texts name ranks and operations.

What Horovod raises as HorovodInternalError is one here too, so that scripts which catch it catch these: a collective that
failed because of other ranks. A wrong argument is a ValueError, as there.
"""

from __future__ import annotations

import builtins

__all__ = [
    "CorruptFrameError",
    "DuplicateNameError",
    "FencedError",
    "HandshakeError",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
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


class DuplicateNameError(InvalidArgumentError):
    """A request of this name is under way on this rank already, in the same process set; nothing was started."""


class HorovodInternalError(RoundelError):
    """A collective operation failed for a reason that is not this rank's arguments. Horovod's name: its scripts catch this.

    `roundel.elastic.run` goes back to the last commit and runs the function again where the job can go on.
    """


class HostsUpdatedInterrupt(RoundelError):
    """Not a failure: hosts came or are about to go. `roundel.elastic.run` catches it, resets the state and runs on.

    skip_sync: the state need not be synchronized (hosts were only removed).
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the hosts of the job have changed")
        self.skip_sync = skip_sync

    def __reduce__(self):
        return type(self), (self.skip_sync,)


class PeerLostError(HorovodInternalError):
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


class MismatchError(HorovodInternalError):
    """Ranks called different operations, or the same one with different shapes, dtypes, roots or names."""


class CorruptFrameError(HorovodInternalError):
    """Bytes changed on their way, or somebody sent garbage. No result has become visible."""


class TimeoutError(HorovodInternalError, builtins.TimeoutError):
    """A deadline passed (ROUNDEL_TIMEOUT, or the call's own); the text names the ranks waited for."""


class HandshakeError(RoundelError):
    """The other end does not know the job's token, belongs to another job, or speaks another version."""


class FencedError(HorovodInternalError):
    """This rank is no longer part of its job: it was silent for ROUNDEL_DEAD_SECONDS, stopped or cut off.

    The others go on, or have ended, without it; it must end, or call shutdown() before init().
    """
