"""Handles of operations under way: those of roundel/handles.py."""

from roundel.handles import Handle, poll, synchronize, waits_for

__all__ = ["Handle", "poll", "synchronize", "waits_for"]
