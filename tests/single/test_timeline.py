"""The merger of timelines, on made-up ones as csrc/engine/timeline.cc and torch.profiler write them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest
from roundel import timeline

BASE = 1_790_857_026_000_000_000  # of both kinds of files


def lines_of(rank: int, spans: list[tuple[str, str, float, float]], dropped: int = 0) -> list[str]:
    """A timeline's lines: spans of (tensor, phase, begin, duration) in microseconds after BASE."""
    head = {"pid": rank, "tid": 0, "ph": "M"}
    events = [
        {"name": "process_name", "args": {"name": f"rank {rank}"}} | head,
        {"name": "process_sort_index", "args": {"sort_index": rank, "baseTimeNanoseconds": BASE}} | head,
    ]
    for tensor, phase, begin, duration in spans:
        events.append(
            {"name": phase, "ph": "X", "ts": begin, "pid": rank, "tid": 2, "dur": duration, "args": {"tensor": tensor}}
        )
    end = {"events": len(spans), "dropped": dropped}
    events.append({"name": "timeline ends", "ph": "i", "ts": 1e6, "pid": rank, "tid": 1, "s": "p", "args": end})
    return ["[", *(json.dumps(e) + "," for e in events[:-1]), json.dumps(events[-1]), "]"]


def write(path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def profile(path, rank: int | None = 0, pid: int = 77) -> str:
    """A trace as torch.profiler writes it: a CPU thread, GPU 0 (process 0!), an arrow between them."""
    events = [
        {"ph": "M", "name": "process_name", "ts": 1.0, "pid": pid, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "process_sort_index", "ts": 1.0, "pid": pid, "tid": 0, "args": {"sort_index": pid}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "pid": pid, "tid": pid, "ts": 500_000.25, "dur": 3.5},
        {"ph": "X", "cat": "kernel", "name": "add", "pid": 0, "tid": 7, "ts": 500_004.125, "dur": 1},
        {"ph": "s", "id": 5, "pid": pid, "tid": pid, "ts": 500_001.0, "cat": "ac2g", "name": "ac2g"},
        {"ph": "f", "id": 5, "pid": 0, "tid": 7, "ts": 500_004.0, "cat": "ac2g", "name": "ac2g", "bp": "e"},
        {"ph": "X", "name": "Trace", "pid": "Spans", "tid": "x", "ts": 500_000.0, "dur": 10},
    ]
    content = {"schemaVersion": 1, "baseTimeNanoseconds": BASE, "traceEvents": events}
    if rank is not None:
        content["distributedInfo"] = {"rank": rank}
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def run(*arguments) -> int:
    return timeline.main([str(a) for a in arguments])


def test_ranks_keep_their_numbers_and_times_their_distances(tmp_path, capsys):
    a = write(tmp_path / "a.json", lines_of(0, [("w", "negotiate", 2_500_000.125, 10.5)]))
    b = write(tmp_path / "b.json", lines_of(3, [("w", "allreduce", 2_500_012.375, 4.0)], dropped=2))
    assert run(a, b, "-o", tmp_path / "all.json") == 0
    out = capsys.readouterr().out
    assert "a.json (rank 0): 2 events\n" in out
    assert "b.json (rank 3): 2 events, 2 dropped\n" in out
    merged = json.loads((tmp_path / "all.json").read_text())
    spans = {e["pid"]: e for e in merged["traceEvents"] if e["ph"] == "X"}
    assert set(spans) == {0, 3}
    assert spans[3]["ts"] - spans[0]["ts"] == 12.25
    assert spans[0]["ts"] == 1_500_000.125  # the mark of the end, in second 1, is the first event here
    assert merged["baseTimeNanoseconds"] == BASE + 1_000_000_000
    assert spans[0]["args"] == {"tensor": "w"}


@pytest.mark.parametrize("keep", range(0, 700, 23))
def test_a_file_that_is_cut_off_anywhere_is_read_to_its_last_whole_line(tmp_path, capsys, keep):
    spans = [(f"t{i}", "allreduce", 10.0 * i, 5.0) for i in range(4)]
    text = "\n".join(lines_of(1, spans))
    cut = text[: len("[\n") + keep]
    (tmp_path / "cut.json").write_text(cut)
    trace = timeline.load(tmp_path / "cut.json")
    whole = [line for line in cut.split("\n")[1:] if line.endswith(("},", "}}"))]
    assert trace.cut_off
    assert trace.events == [json.loads(line.removesuffix(",")) for line in whole]
    assert run(tmp_path / "cut.json", "-o", tmp_path / "all.json") == 0
    assert "cut off" in capsys.readouterr().out


def test_profiler_traces_line_up_and_get_processes_of_their_own(tmp_path, capsys):
    ours = write(tmp_path / "t.rank0.json", lines_of(0, [("w", "allreduce", 500_002.0, 1.0)]))
    first, second = profile(tmp_path / "p0.json", 0), profile(tmp_path / "p1.json.gz", 1)
    other = profile(tmp_path / "p2.json", None)
    assert run(ours, first, second, other, "-o", tmp_path / "all.json.gz") == 0
    assert "p1.json.gz (torch, rank 1): 3 events" in capsys.readouterr().out
    merged = json.loads(gzip.decompress((tmp_path / "all.json.gz").read_bytes()))
    events = merged["traceEvents"]
    ours_at = next(e["ts"] for e in events if e["name"] == "allreduce")
    adds = [e for e in events if e["name"] == "aten::add"]
    assert [ours_at - e["ts"] for e in adds] == [1.75] * 3
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [names[e["pid"]] for e in adds] == ["python (rank 0)", "python (rank 1)", "python (p2.json)"]
    assert names[0] == "rank 0"
    kernels = [e["pid"] for e in events if e["name"] == "add"]
    assert 0 not in kernels and len(set(kernels)) == 3  # GPU 0 of three ranks is not rank 0
    assert all(isinstance(e["pid"], int) for e in events)
    arrows = [(e["ph"], e["id"]) for e in events if e["ph"] in "sf"]
    assert len({i for _, i in arrows}) == 3
    assert all(("f", i) in arrows for ph, i in arrows if ph == "s")


def test_what_was_merged_can_be_merged_again(tmp_path):
    a = write(tmp_path / "a.json", lines_of(0, [("w", "allreduce", 2_000_000.5, 1.0)]))
    b = write(tmp_path / "b.json", lines_of(1, [("w", "allreduce", 2_000_001.5, 1.0)]))
    torch = profile(tmp_path / "p.json")
    assert run(a, torch, "-o", tmp_path / "some.json") == 0
    assert run(tmp_path / "some.json", b, profile(tmp_path / "q.json", 1), "-o", tmp_path / "all.json") == 0
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    spans = {e["pid"]: e["ts"] for e in events if e["name"] == "allreduce"}
    assert spans[1] - spans[0] == 1.0
    assert len({e["pid"] for e in events if e["name"] == "aten::add"}) == 2


@pytest.mark.parametrize("content", ["", "hello", "{}", "7", '{"traceEvents": 3}', "[1, 2]", '{"traceEvents": [{}'])
def test_anything_else_is_refused(tmp_path, capsys, content):
    (tmp_path / "x.json").write_text(content)
    assert run(tmp_path / "x.json", "-o", tmp_path / "all.json") == 2
    assert "is no trace" in capsys.readouterr().err
    assert not (tmp_path / "all.json").exists()


def test_what_cannot_be_read_or_written_is_named(tmp_path, capsys):
    assert run(tmp_path / "none.json", "-o", tmp_path / "all.json") == 2
    assert "none.json" in capsys.readouterr().err
    a = write(tmp_path / "a.json", lines_of(0, []))
    assert run(a, "-o", tmp_path / "no" / "all.json") == 2
    assert "all.json" in capsys.readouterr().err


def test_a_killed_process_leaves_a_file_that_can_be_read(tmp_path):
    script = """
import os, signal, time, numpy, roundel
from pathlib import Path
roundel.init()
for i in range(50):
    roundel.world.engine().allreduce([numpy.ones(10)], name=f"t{i}").wait()
while '"t49"' not in Path(os.environ["ROUNDEL_TIMELINE"].replace("{rank}", "0")).read_text():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "killed-{rank}.json"
    environment = os.environ | {"ROUNDEL_TIMELINE": str(path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    trace = timeline.load(tmp_path / "killed-0.json")
    assert trace.cut_off and trace.ranks == {0}
    assert {e["args"]["tensor"] for e in trace.events if e["name"] == "allreduce"} == {f"t{i}" for i in range(50)}
    assert run(tmp_path / "killed-0.json", "-o", tmp_path / "all.json") == 0


def test_a_process_that_just_ends_leaves_a_complete_file(tmp_path):
    script = "import numpy, roundel; roundel.init(); roundel.world.engine().allreduce([numpy.ones(10)], name='t').wait()"
    environment = os.environ | {"ROUNDEL_TIMELINE": str(tmp_path / "t.json")}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False).returncode == 0
    events = json.loads((tmp_path / "t.rank0.json").read_text())
    assert any(e["name"] == "allreduce" for e in events)


def test_roundel_timeline_is_the_same(tmp_path, capsys):
    from roundel.cli import main

    a = write(tmp_path / "a.json", lines_of(2, [("w", "allreduce", 1.0, 1.0)]))
    assert main(["timeline", a, "-o", str(tmp_path / "all.json")]) == 0
    assert "rank 2" in capsys.readouterr().out
