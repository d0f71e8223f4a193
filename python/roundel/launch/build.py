"""--check-build: what this installation can do, in the form of horovodrun's own report."""

from __future__ import annotations

import importlib.util

__all__ = ["build_report"]


def build_report(version: str) -> str:
    """The report. A box is ticked for what works now: a library that is found but that no collective uses is not."""
    boxes = {
        "Available Frameworks": {
            "TensorFlow": False,
            "PyTorch": importlib.util.find_spec("torch") is not None,
            "MXNet": False,
            "NumPy and DLPack": True,
        },
        "Available Controllers": {"MPI": False, "Gloo": False, "Roundel": True},
        "Available Tensor Operations": {
            "NCCL": False,
            "DDL": False,
            "CCL": False,
            "MPI": False,
            "Gloo": False,
            "Shared memory": True,
            "TCP": True,
        },
    }
    lines = [f"Roundel v{version}:"]
    for title, rows in boxes.items():
        lines += ["", f"{title}:"]
        lines += [f"    [{'X' if there else ' '}] {name}" for name, there in rows.items()]
    try:
        from roundel import _core  # here, so that --version and --help answer even when the core does not load

        lines += ["", "On this machine:", *(f"    {name}: {value}" for name, value in _core.info().items())]
    except ImportError as error:
        lines += ["", f"The compiled core cannot be loaded: {error}"]
    return "\n".join(lines)
