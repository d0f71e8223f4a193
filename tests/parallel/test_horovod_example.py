"""A Horovod script runs with its import changed, and nothing else: examples/horovod_mnist.py, as users would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_start import clean_environment, script

EXAMPLE = Path(__file__).parents[2] / "examples" / "horovod_mnist.py"


@pytest.fixture
def train(tmp_path):
    """The script with the one line changed that the page names, ready to be started with flags of both kinds."""
    pytest.importorskip("torch")
    text, changed = re.subn(r"^import horovod\.torch as hvd$", "import roundel.torch as hvd", EXAMPLE.read_text(), flags=re.M)
    assert changed == 1
    (tmp_path / "train.py").write_text(text)

    def run(*arguments: str, flags: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
        command = [script("roundelrun"), "-np", "2", *flags, sys.executable, str(tmp_path / "train.py")]
        return subprocess.run(
            [*command, "--log-dir", str(tmp_path), *arguments],
            env=clean_environment() | env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    return run


def result(done: subprocess.CompletedProcess) -> float:
    """Its last line's accuracy, after the check that all ranks hold the same weights."""
    assert done.returncode == 0, done.stderr
    found = re.search(r"2 ranks, \d+ epochs: accuracy ([\d.]+), ranks differ by 0$", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    return float(found[1])


def test_it_trains_and_goes_on_from_its_checkpoint(train, tmp_path):
    flags = ("--fusion-threshold-mb", "32", "--cycle-time-ms", "3.5", "--timeline-filename", str(tmp_path / "timeline.json"))
    first = train("--epochs", "2", flags=flags, HOROVOD_START_TIMEOUT="90")
    assert result(first) > 0.5
    assert "rank 1 read longest" in first.stdout
    assert "--cycle-time-ms has no effect" in first.stderr
    assert first.stderr.count("HOROVOD_START_TIMEOUT as ROUNDEL_START_TIMEOUT=90") == 1
    assert (tmp_path / "checkpoint-2.pt").exists()
    second = train("--epochs", "4", "--fp16-allreduce", "--gradient-predivide-factor", "2.0")
    assert result(second) > 0.8
    assert "epoch 1:" not in second.stdout and "epoch 2:" in second.stdout


@pytest.mark.parametrize("arguments", [["--use-adasum"], ["--batches-per-allreduce", "2", "--base-lr", "0.01"]])
def test_its_other_options(train, arguments):
    assert result(train("--epochs", "2", "--samples", "2000", *arguments)) > 0.4
