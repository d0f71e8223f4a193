"""The benchmarks: what they print and write, that they check what they time, and their arithmetic."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402
from bench.__main__ import counts, parse, parse_bytes  # noqa: E402
from bench.collectives import CEILINGS, COLLECTIVES, Case, Job  # noqa: E402
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
        if name not in COLLECTIVES:
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
    case.run()
    assert case.check(1) is None
    case.out[999] += 1
    assert "element 999" in case.check(1)


def test_the_readme_explains_every_field():
    text = (ROOT / "bench" / "README.md").read_text()
    for name in (*report.FIELDS, *report.MACHINE_FIELDS, *report.ROW_FIELDS):
        assert f"`{name}`" in text


def test_validation_names_what_is_wrong():
    document = dict.fromkeys(report.FIELDS, None)
    with pytest.raises(ValueError, match="document: schema is None"):
        report.validate(document)
    with pytest.raises(ValueError, match="missing \\['rows'\\], unknown \\['extra'\\]"):
        report.validate({k: v for k, v in document.items() if k != "rows"} | {"extra": 1})
