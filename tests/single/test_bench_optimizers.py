"""`python -m bench optimizers`: its layouts, that it checks what it times, what it writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from optim_reference import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from bench import optimizers  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.report import MACHINE_FIELDS  # noqa: E402


def test_layouts_have_the_numbers_they_are_named_after():
    count = optimizers.COUNT
    shapes = {name: layout(count) for name, layout in optimizers.LAYOUTS.items()}
    assert {name: len(some) for name, some in shapes.items()} == {"A": 1, "B": 161, "C": 1000, "S": 1000}
    elements = {name: sum(torch.Size(shape).numel() for shape in some) for name, some in shapes.items()}
    assert elements == {"A": count, "B": pytest.approx(count, rel=0.01), "C": count, "S": 16_000}


def test_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["-c", 1000, "-n", 2, "-t", 1, "-l", "A", "--json", file]
    assert main(["optimizers", *map(str, arguments)]) == 0
    document = json.loads(file.read_text())
    assert document["benchmark"] == "optimizers" and document["machine"].keys() == MACHINE_FIELDS.keys()
    rows = document["rows"]
    assert {row["workload"] for row in rows} == set(optimizers.WORKLOADS)
    peers = [row["peer"] for row in rows if row["workload"] == "adamw" and "DeepSpeed" not in str(row["peer"])]
    assert peers == [None, "torch for-loop", "torch foreach", "torch fused", optimizers.ROOF]
    assert {row["workload"] for row in rows if row["peer"] == optimizers.ROOF} == {"adamw", "rmsprop", "whole"}
    for row in rows:
        ours = next(r for r in rows if r["peer"] is None and r["workload"] == row["workload"])
        assert row["ratio"] == pytest.approx(row["time_us"] / ours["time_us"])
        assert row["p10_us"] <= row["time_us"] <= row["p90_us"]
        assert row["round_trip_ns"] is None or row["round_trip_ns"] > 1
    said = capsys.readouterr().out
    assert re.search(r"^float32 AdamW, one tensor, 1,000 parameters, 1 thread\(s\), median of 2$", said, re.M)


def test_only_turns_at_the_wanted_distance_count(monkeypatch):
    distances = iter([9e-7, 5e-8, 6e-8, 9e-7, 9e-7, 7e-8, 8e-8])  # too far; turn; turn, moved; too far; turn
    monkeypatch.setattr(optimizers, "round_trip", lambda: next(distances))
    monkeypatch.setattr(optimizers.time, "sleep", lambda _: None)
    turns = iter(range(1, 100))
    monkeypatch.setattr(optimizers, "batch", lambda step, calls: next(turns))
    seconds, round_trips = optimizers.seconds_by_peer({"one": lambda: None}, 2, (0, 100))
    assert round_trips == [5e-8, 7e-8]
    assert seconds == {"one": [2, 4]}  # 1 was to find out how many calls a batch needs, 3 ended elsewhere
    monkeypatch.setattr(optimizers, "AWAITED_SECONDS", 0)
    monkeypatch.setattr(optimizers, "round_trip", lambda: 9e-7)
    with pytest.raises(SystemExit, match="threads were 900 ns apart"):
        optimizers.await_distance((0, 100))


def test_a_wrong_result_is_not_timed():
    peers = optimizers.adamw([(5,), (3, 2)], torch.float32)
    optimizers.agree(peers, "here")
    with torch.no_grad():
        peers["torch fused"].params[1][2, 1] += 1e-3
    with pytest.raises(SystemExit, match=r"bench: here: torch fused and roundel differ by 1\.0e-03"):
        optimizers.agree(peers, "here")


@pytest.mark.parametrize(
    "arguments", [["-l", "A,X"], ["-t", "none"], ["-w", "adam"], ["-n", "0"], ["-c", "10"], ["--apart", "9-3"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        optimizers.parse(arguments)
    assert caught.value.code == 2
    assert "python -m bench optimizers: error" in capsys.readouterr().err
