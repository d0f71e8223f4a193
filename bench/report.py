"""From timings to rows, and rows as a table, as JSON and as a picture. The fields are explained in bench/README.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import numpy as np
import roundel
from roundel import _core

from bench.collectives import CEILINGS, Collective, Job
from bench.measure import Timing

SCHEMA = 1
FIELDS = {"schema": int, "benchmark": str, "date": str, "machine": dict, "ranks": int, "hosts": int, "transport": str,
          "isa": str, "op": (str, type(None)), "versions": dict, "rows": list}  # fmt: skip
MACHINE_FIELDS = {"cpu": str, "cores": int, "memory_bytes": int, "kernel": str}
ROW_FIELDS = {"bytes": int, "count": int, "dtype": str, "variant": str, "time_us": float, "p10_us": float, "p90_us": float,
              "algbw": float, "busbw": float, "copy_GBs": float, "ceiling_GBs": float, "limit_us": float,
              "percent_of_limit": float, "repetitions": int}  # fmt: skip


def make_rows(row: Collective, job: Job, timings: list[Timing]) -> list[dict]:
    """One row for each timing that is not a ceiling."""
    rates = {}  # bytes a second of all ranks together, by ceiling and count
    for timing in timings:
        case = timing.case
        if case.variant in CEILINGS:
            traffic = CEILINGS[case.variant].traffic(job.size) * case.bytes
            rates[case.variant, case.count] = traffic / float(np.median(timing.seconds))
    rows = []
    for timing in timings:
        case, size = timing.case, job.size
        if case.variant in CEILINGS:
            continue
        low, median, high = (float(s) for s in np.percentile(timing.seconds, (10, 50, 90)))
        ceiling = rates[case.ceiling, case.count]
        limit = row.traffic(size) * case.bytes / ceiling
        algbw = case.bytes / median * 1e-9
        rows.append({
            "bytes": case.bytes, "count": case.count, "dtype": job.dtype.name, "variant": case.variant,
            "time_us": median * 1e6, "p10_us": low * 1e6, "p90_us": high * 1e6,
            "algbw": algbw, "busbw": algbw * row.busbw(size),
            "copy_GBs": rates["copy", case.count] * 1e-9, "ceiling_GBs": ceiling * 1e-9,
            "limit_us": limit * 1e6, "percent_of_limit": 100 * limit / median, "repetitions": len(timing.seconds),
        })  # fmt: skip
    return rows


def make_document(row: Collective, job: Job, rows: list[dict]) -> dict:
    return {
        "schema": SCHEMA,
        "benchmark": row.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "ranks": job.size,
        "hosts": len(set(job.comm.hosts)),
        "transport": job.comm.transport,
        "isa": _core.info()["isa"],
        "op": job.op if row.reduces else None,
        "versions": {"roundel": roundel.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }


def machine() -> dict:
    """What the figures depend on; nothing that says whose machine it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def validate(document: dict) -> None:
    """Raises ValueError when a document does not have exactly the schema's fields with their types."""
    _need(document, FIELDS, "document")
    _need(document["machine"], MACHINE_FIELDS, "machine")
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}, expected {SCHEMA}")
    for i, row in enumerate(document["rows"]):
        _need(row, ROW_FIELDS, f"row {i}")


def _need(found: dict, fields: dict, where: str) -> None:
    if found.keys() != fields.keys():
        missing, unknown = sorted(fields.keys() - found.keys()), sorted(found.keys() - fields.keys())
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    for name, kind in fields.items():
        if not isinstance(found[name], kind):
            raise ValueError(f"{where}: {name} is {found[name]!r}")


def write_json(document: dict, path: str) -> None:
    validate(document)
    Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


COLUMNS = (("bytes", "{:d}", 11), ("count", "{:d}", 10), ("dtype", "{}", 9), ("variant", "{}", 8), ("time_us", "{:.2f}", 11),
           ("algbw", "{:.3f}", 9), ("busbw", "{:.3f}", 9), ("percent_of_limit", "{:.0f}", 8))  # fmt: skip
TITLES = {"time_us": "time us", "algbw": "algbw", "busbw": "busbw", "percent_of_limit": "% limit"}


def table(document: dict) -> str:
    """The rows as text, under what they were measured on."""
    d, box = document, document["machine"]
    what = d["benchmark"] + (f" ({d['op']})" if d["op"] else "")
    where = f"{d['ranks']} rank(s) on {d['hosts']} host(s), transport {d['transport']}"
    lines = [
        f"# {what}, {where}, {d['isa']}; {box['cpu']}, {box['cores']} cores",
        f"# median of {d['rows'][0]['repetitions']} repetitions; GB/s of 10^9 bytes; limit: memory traffic / ceiling",
        "  ".join(f"{TITLES.get(name, name):>{width}}" for name, _, width in COLUMNS),
    ]
    lines += ["  ".join(f"{form.format(row[name]):>{width}}" for name, form, width in COLUMNS) for row in d["rows"]]
    return "\n".join(lines)


def plot(document: dict, path: str) -> None:
    """Time and bus bandwidth against size, one line for each variant, with its limit. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = document["rows"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        sizes = [row["bytes"] for row in mine]
        line = left.plot(sizes, [row["time_us"] for row in mine], marker=".", label=variant)
        left.fill_between(sizes, [r["p10_us"] for r in mine], [r["p90_us"] for r in mine], alpha=0.2, color=line[0].get_color())
        right.plot(sizes, [row["busbw"] for row in mine], marker=".", label=variant)
        limited = [row for row in mine if row["limit_us"] > 0]
        dashed = {"linestyle": "--", "color": line[0].get_color(), "label": f"limit of {variant}"}
        left.plot([row["bytes"] for row in limited], [row["limit_us"] for row in limited], **dashed)
        right.plot([row["bytes"] for row in limited], [r["busbw"] * r["time_us"] / r["limit_us"] for r in limited], **dashed)
    for axes, label in ((left, "time of a call, us (p10 to p90)"), (right, "bus bandwidth, GB/s")):
        axes.set(xscale="log", xlabel="bytes", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_yscale("log")
    d = document
    figure.suptitle(f"{d['benchmark']}, {d['ranks']} rank(s), {d['transport']}, {d['machine']['cpu']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
