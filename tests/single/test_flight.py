"""The reader of flight records, on made-up ones."""

from __future__ import annotations

import json

import pytest
from roundel import flight


def write(directory, rank: int, calls: list[tuple[str, str, str]], size: int = 3, epoch: int = 1) -> None:
    lines = [{"rank": rank, "size": size, "pid": 1, "written": 0.0, "why": f"trouble {rank}"}]
    for number, (what, name, state) in enumerate(calls, 17):
        lines.append(
            {"number": number, "sequence": number, "epoch": epoch, "group": 0, "what": what, "name": name, "state": state}
            | {"waiting_for": [2] if state == "failed" else []}
        )
    lines.append(lines[-1] | {"sequence": flight.POINT_TO_POINT | 3})  # a transfer: counted apart
    (directory / f"flight.rank{rank}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


SUM, MAX = ("all-reduce of 8 float32, sum", "w", "done"), ("all-reduce of 8 float32, max", "w", "done")


def test_ranks_that_agree(tmp_path, capsys):
    for rank in range(3):
        write(tmp_path, rank, [SUM, SUM])
    assert flight.main([str(tmp_path)]) == 0
    assert "all ranks called the same operations" in capsys.readouterr().out


def test_a_rank_that_is_behind_is_named(tmp_path, capsys):
    for rank in (0, 1):
        write(tmp_path, rank, [SUM, ("all-reduce of 8 float32, sum", "v", "failed")])
    write(tmp_path, 2, [SUM])
    assert flight.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "rank 2 has come to operation 17 only; ranks 0, 1 called operation 18, all-reduce of 8 float32, sum 'v'" in out
    assert "rank 0: operation 18, all-reduce of 8 float32, sum 'v', is failed, waiting for rank 2" in out


def test_what_differs_and_who_left_no_record(tmp_path, capsys):
    write(tmp_path, 0, [SUM, SUM])
    write(tmp_path, 1, [SUM, MAX])
    assert flight.main([str(tmp_path / "flight.rank0.json"), str(tmp_path / "flight.rank1.json")]) == 1
    out = capsys.readouterr().out
    assert "operation 18 differs: rank 0 called all-reduce of 8 float32, sum 'w'; rank 1 called" in out
    assert "rank 2 left no record" in out


@pytest.mark.parametrize("content", ["", "{}", "[]", "hello", '{"rank": 0}'])
def test_anything_else_is_refused(tmp_path, capsys, content):
    (tmp_path / "flight.rank0.json").write_text(content)
    assert flight.main([str(tmp_path)]) == 2
    assert "is no flight record" in capsys.readouterr().err
    assert flight.main([str(tmp_path / "nothing.json")]) == 2


def test_an_empty_directory(tmp_path, capsys):
    assert flight.main([str(tmp_path)]) == 2
    assert "no files" in capsys.readouterr().err


def test_roundel_flight_is_the_same(tmp_path, capsys):
    from roundel.cli import main

    for rank in range(3):
        write(tmp_path, rank, [SUM])
    assert main(["flight", str(tmp_path)]) == 0
    assert "all ranks called the same operations" in capsys.readouterr().out
