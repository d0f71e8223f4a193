"""What survives a failed step: states that can be saved, restored and made equal on all ranks."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterable
from typing import Any

from roundel.errors import HostsUpdatedInterrupt

__all__ = ["HostUpdateResult", "ObjectState", "State"]


class HostUpdateResult:
    """What happened to the hosts; removed | added is mixed."""

    no_update = 0
    removed = 1
    added = 2
    mixed = removed | added


class State:
    """Base of states. A subclass says how to save(), restore(), sync() and, where it needs to, reset().

    bcast_object: gives every rank rank 0's object. get_rank: this process's rank.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: queue.Queue[tuple[float, int]] = queue.Queue()
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], None]]) -> None:
        """Functions to call after a reset: for example to scale the learning rate to the number of ranks."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Called by run() before the function runs again."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Somebody learnt that hosts came or went: the next commit() or check_host_updates() raises HostsUpdatedInterrupt."""
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """save(), then check_host_updates(). It copies the state, so it need not happen in every step."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raise HostsUpdatedInterrupt on all ranks when rank 0 has been told of new hosts since the last time."""
        latest, updates = self._last_updated_timestamp, HostUpdateResult.no_update
        while not self._host_messages.empty():
            timestamp, update = self._host_messages.get()
            if timestamp > latest:
                latest, updates = timestamp, updates | update
        before = self._last_updated_timestamp
        before, self._last_updated_timestamp, updates = self._bcast_object((before, latest, updates))
        if self._last_updated_timestamp > before:
            raise HostsUpdatedInterrupt(updates == HostUpdateResult.removed)

    def save(self) -> None:
        """Keep a copy in host memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the last copy."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take rank 0's state on all ranks."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called at a reset, before the callbacks."""


class ObjectState(State):
    """Python objects as attributes: every keyword argument becomes one. save() copies them, bcast_object carries them."""

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        self._saved_state = kwargs
        self._set_attrs()
        super().__init__(bcast_object=bcast_object, get_rank=get_rank)
        self._saved_state = copy.deepcopy(kwargs)

    def save(self) -> None:
        """Keep copies of the attributes."""
        self._saved_state = {name: copy.deepcopy(getattr(self, name)) for name in self._saved_state}

    def restore(self) -> None:
        """Give the attributes the values of the last save()."""
        self._set_attrs()

    def sync(self) -> None:
        """Give the attributes the values that rank 0 saved last."""
        if self._saved_state:
            self._saved_state = self._bcast_object(self._saved_state)
            self._set_attrs()

    def _set_attrs(self) -> None:
        for name, value in self._saved_state.items():
            setattr(self, name, copy.deepcopy(value))
