"""Python objects as bytes, for members of one job, who trust each other."""

from __future__ import annotations

import pickle
from typing import Any

__all__ = ["dumps"]


def dumps(obj: Any) -> bytes:
    """By pickle, or by cloudpickle where it is installed and pickle cannot (functions and classes of the script)."""
    try:
        return pickle.dumps(obj)
    except Exception:
        try:
            import cloudpickle
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        return cloudpickle.dumps(obj)
