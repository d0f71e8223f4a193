"""The engine's timeline and counters: what they say of operations that really ran."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import roundel.timeline
from roundel.errors import InvalidArgumentError
from roundel.world import engine

TEAMS = [("shm", 1), ("shm", 2), ("tcp", 3), ("hosts", 4)]
ADASUM = 5


class Recording:
    """The timeline of this rank while the block runs, as events with `begin` and `end` in seconds of unix time."""

    def __init__(self, comm, mark_cycles: bool = False) -> None:
        self.comm, self.mark_cycles = comm, mark_cycles

    def __enter__(self) -> Recording:
        self.directory = tempfile.TemporaryDirectory()
        self.before = time.time()
        engine().start_timeline(f"{self.directory.name}/t.json", self.mark_cycles)
        return self

    def __exit__(self, *failure) -> None:
        engine().stop_timeline()
        self.path = Path(self.directory.name) / f"t.rank{self.comm.rank}.json"
        self.trace = roundel.timeline.load(self.path)
        self.directory.cleanup()
        assert not self.trace.cut_off
        assert self.trace.ranks == {self.comm.rank}
        self.events = [e for e in self.trace.events if e["ph"] != "M"]
        for e in self.events:
            e["begin"] = self.trace.base_ns * 1e-9 + e["ts"] * 1e-6
            e["end"] = e["begin"] + e.get("dur", 0) * 1e-6
            assert self.before - 1e-3 <= e["begin"] <= e["end"] <= time.time() + 1e-3

    def phases(self, tensor: str) -> dict[str, dict]:
        """By name; each must be there once."""
        found = [e for e in self.events if e.get("args", {}).get("tensor") == tensor]
        assert len({e["name"] for e in found}) == len(found), found
        return {e["name"]: e for e in found}


def test_phases_of_a_tensor_follow_each_other(comm):
    with Recording(comm) as recording:
        engine().allreduce([np.ones(1000, np.float32)], name="grad").wait()
        engine().allgather([np.ones((2, 3))], name="rows").wait()
        engine().broadcast(np.ones(5, np.int64), 0, name="state").wait()
        engine().alltoall(np.ones(comm.size, np.int8), name="swap").wait()
        engine().reduce_scatter([np.ones((comm.size, 4), np.float32)], 0, name="part").wait()
        engine().allreduce([np.ones(7)], op=ADASUM, name="ada").wait()
    carried_out = {}
    for tensor in ("grad", "rows", "state", "swap", "part", "ada"):
        phases = recording.phases(tensor)
        assert len(phases) == 3 and {"negotiate", "queue"} < set(phases), phases
        (what,) = set(phases) - {"negotiate", "queue"}
        carried_out[tensor] = phases[what]
        chain = [phases["negotiate"], phases["queue"], phases[what]]
        for earlier, later in itertools.pairwise(chain):
            assert earlier["end"] <= later["begin"] + 1e-6
        waited_for = phases["negotiate"]["args"].get("waited_for", [0])
        assert len(waited_for) == 1 and 0 <= waited_for[0] < comm.size
    arguments = carried_out["grad"]["args"]
    assert (arguments["bytes"], arguments["dtype"]) == (4000, "float32")
    assert arguments["how"] and arguments.get("fused", 1) == 1
    assert carried_out["rows"]["args"]["bytes"] == 48


def test_tensors_that_travel_together_say_so(comm):
    with Recording(comm) as recording:
        xs = [np.ones(100, np.float32) for _ in range(20)]
        engine().allreduce([*xs], name="group").wait()
        # One driver at a time: what comes while it is busy travels together, so some of these do.
        handles = [engine().allreduce([x], name=f"t{i}") for i, x in enumerate(xs * 10)]
        for handle in handles:
            handle.wait()
    packed = [e for e in recording.events if e["name"] == "memcpy_in"]
    together = [e for e in recording.events if e.get("args", {}).get("fused", 0) > 1]
    assert packed and together
    for i in range(200):
        names = set(recording.phases(f"t{i}"))
        assert names in ({"negotiate", "queue", "allreduce"}, {"negotiate", "queue", "allreduce", "memcpy_in", "memcpy_out"})


def test_it_names_whom_the_ranks_waited_for(comm):
    last = comm.size - 1
    comm.barrier()
    engine().reset_stats()
    with Recording(comm) as recording:
        if comm.rank == last:
            time.sleep(0.2)
        engine().allreduce([np.ones(3)], name="late").wait()
    phases = recording.phases("late")
    assert phases["negotiate"]["args"]["waited_for"] == [last]
    stats = engine().stats()
    assert stats["waited_for"][last]["requests"] == 1
    if comm.rank != last:
        assert phases["negotiate"]["end"] - phases["negotiate"]["begin"] > 0.15
        assert stats["waited_for"][last]["seconds"] > 0.15


def test_it_starts_and_stops_at_any_time(comm):
    for i in range(3):
        engine().allreduce([np.ones(3)], name="outside").wait()
        with Recording(comm, mark_cycles=True) as recording:
            engine().allreduce([np.ones(3)], name=f"inside {i}").wait()
        assert not recording.phases("outside")
        assert "allreduce" in recording.phases(f"inside {i}")
        assert any(e["ph"] == "i" and e["name"] == "batch" for e in recording.events)
    engine().stop_timeline()  # is off already


def test_it_refuses_what_it_cannot_write(comm):
    with pytest.raises(InvalidArgumentError, match=f"/nowhere/t.rank{comm.rank}.json"):
        engine().start_timeline("/nowhere/t.json", False)
    with Recording(comm), pytest.raises(InvalidArgumentError, match="already"):
        engine().start_timeline("/tmp/other.json", False)
    engine().allreduce([np.ones(3)], name="after").wait()


def test_it_lines_up_with_a_trace_of_torch_profiler(comm):
    if comm.size != 2:
        return
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile, record_function

    with Recording(comm) as recording, profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(3):
            with record_function(f"around {i}"):
                engine().allreduce([np.ones(1000)], name=f"t{i}").wait()
    with tempfile.TemporaryDirectory() as directory:
        profiler.export_chrome_trace(f"{directory}/torch.json")
        theirs = roundel.timeline.load(Path(directory) / "torch.json")
    merged = roundel.timeline.merge([recording.trace, theirs])["traceEvents"]
    for i in range(3):
        around = next(e for e in merged if e["name"] == f"around {i}" and e["ph"] == "X")
        for e in merged:
            if e.get("args", {}).get("tensor") == f"t{i}":
                assert around["ts"] - 50 <= e["ts"] and e["ts"] + e["dur"] <= around["ts"] + around["dur"] + 50  # microseconds
    assert torch.__version__


def test_counters(comm):
    comm.barrier()
    engine().reset_stats()
    for i in range(5):
        engine().allreduce([np.ones(100, np.float32), np.ones(50, np.float64)], name=f"pair {i}").wait()
    engine().broadcast(np.ones(3, np.float32), 0, name="b").wait()
    stats = engine().stats()
    sums, casts = stats["kinds"]["allreduce"], stats["kinds"]["broadcast"]
    assert (sums["requests"], sums["tensors"], sums["bytes"], sums["failed"]) == (5, 10, 5 * 800, 0)
    assert 5 <= sums["batches"] <= 10
    assert sums["execute_seconds"] > 0 and sums["negotiate_seconds"] >= 0 and sums["queue_seconds"] >= 0
    assert (casts["requests"], casts["tensors"], casts["bytes"], casts["batches"]) == (1, 1, 12, 1)
    assert set(stats["waited_for"]) == set(range(comm.size))
    assert sum(w["requests"] for w in stats["waited_for"].values()) == 6
    assert stats["seconds"] > 0
    engine().reset_stats()
    assert engine().stats()["kinds"]["allreduce"]["requests"] == 0
