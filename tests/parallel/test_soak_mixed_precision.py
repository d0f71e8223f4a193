"""Training in mixed precision ends where float32 ends: examples/digits.py, five seeds each."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.py"
SEEDS = 5
MOST_POINTS = 0.5  # between the means of held-out accuracy; one of the 450 images is 0.22 points

pytestmark = pytest.mark.soak


def mean_accuracy(directory: Path, precision: str, epochs: int) -> float:
    """In percent, over the seeds."""
    found = []
    for seed in range(1, SEEDS + 1):
        file = directory / f"{precision}-{epochs}-{seed}.json"
        options = ["--precision", precision, "--epochs", epochs, "--seed", seed, "--json", file]
        subprocess.run([sys.executable, EXAMPLE, *map(str, options)], check=True, timeout=600, capture_output=True)
        found.append(100 * json.loads(file.read_text())["held_out_accuracy"])
    print(f"{precision}, {epochs} epochs: {statistics.mean(found):.2f} %, {min(found):.1f} to {max(found):.1f}")
    return statistics.mean(found)


@pytest.mark.parametrize(("precision", "epochs"), [("bfloat16", 30), ("float16", 5)])  # float16 is slow on CPUs
def test_accuracy_is_that_of_float32(tmp_path, precision, epochs):
    pytest.importorskip("sklearn")
    wide, narrow = (mean_accuracy(tmp_path, name, epochs) for name in ("float32", precision))
    assert abs(narrow - wide) <= MOST_POINTS
