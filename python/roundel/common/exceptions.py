"""Errors, under the name of the module that has them in Horovod."""

from roundel.errors import HorovodInternalError, HostsUpdatedInterrupt

__all__ = ["HorovodInternalError", "HostsUpdatedInterrupt"]
