"""start_timeline() and stop_timeline(): every rank's trace names its operations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import roundel.torch as hvd
import torch

TEAMS = [("shm", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("tcp", 2), ("tcp", 3), ("tcp", 4)]


def test_a_timeline_can_be_started_and_stopped(comm):
    with tempfile.TemporaryDirectory(prefix="roundel-timeline-") as directory:
        for name, mark_cycles in (("first", False), ("second", True)):
            path = Path(directory) / f"{name}.{{rank}}.json"
            hvd.allreduce(torch.ones(3), name="before")
            hvd.start_timeline(str(path), mark_cycles)
            hvd.allreduce(torch.ones(3), name=name)
            hvd.stop_timeline()
            hvd.allreduce(torch.ones(3), name="after")
            text = Path(str(path).format(rank=comm.rank)).read_text()
            json.loads(text)
            assert f'"{name}"' in text and '"before"' not in text and '"after"' not in text
