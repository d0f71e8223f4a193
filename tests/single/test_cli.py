"""The command `roundel`."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
import roundel

ROUNDEL = str(Path(sysconfig.get_path("scripts")) / "roundel")


def test_info_tells_what_was_built_and_found():
    out = subprocess.run([ROUNDEL, "info", "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
    rows = json.loads(out)
    assert rows["version"] == roundel.__version__
    assert set(rows) == {"version", "python", "platform", "transports", "isa", "cuda", "mpi", "nccl"}
    assert all(rows.values())
    text = subprocess.run([ROUNDEL, "info"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert [line.split()[0] for line in text.splitlines()] == list(rows)


@pytest.mark.parametrize("isa", ["portable", "mmx"])
def test_isa_can_be_forced_to_what_there_is(isa, monkeypatch):
    monkeypatch.setenv("ROUNDEL_ISA", isa)
    done = subprocess.run([ROUNDEL, "info", "--json"], capture_output=True, text=True, check=False, timeout=60)
    if isa == "portable":
        assert json.loads(done.stdout)["isa"] == "portable"
    else:
        assert done.returncode != 0 and "mmx" in done.stderr and "portable" in done.stderr
