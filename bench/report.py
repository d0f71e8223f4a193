"""From timings to rows, and rows as a table, as JSON and as a picture. The fields are explained in bench/README.md.

A ratio is a peer's time divided by ours: above 1, we are faster.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import numpy as np
import roundel
from roundel import _core

from bench import peers
from bench.collectives import CEILING_NAMES, SOCKET, Collective, Job
from bench.measure import Timing

SCHEMA = 2
MEMORY = "memory traffic / ceiling"
FIELDS = {"schema": int, "benchmark": str, "date": str, "machine": dict, "ranks": int, "hosts": int, "transport": str,
          "isa": str, "op": (str, type(None)), "versions": dict, "limit": str, "peers": dict, "summary": dict,
          "rows": list}  # fmt: skip
MACHINE_FIELDS = {"cpu": str, "cores": int, "memory_bytes": int, "kernel": str}
PEER_FIELDS = {"library": (str, type(None)), "cores": (int, type(None)), "scheduler": (str, type(None)), "note": str}
ROW_FIELDS = {"bytes": int, "count": int, "dtype": str, "peer": (str, type(None)), "variant": str, "time_us": float,
              "p10_us": float, "p90_us": float, "algbw": float, "busbw": float, "copy_GBs": float, "ceiling_GBs": float,
              "limit_us": float, "percent_of_limit": float, "ratios": dict, "repetitions": int}  # fmt: skip


def make_rows(row: Collective, job: Job, timings: list[Timing]) -> list[dict]:
    """One row for each timing that is not a ceiling."""
    rates = {}  # bytes a second of all ranks together, by ceiling and count
    for timing in timings:
        case = timing.case
        if case.variant in CEILING_NAMES:
            traffic = case.row.traffic(job.size) * case.bytes
            rates[case.variant, case.count] = traffic / float(np.median(timing.seconds))
    rows = []
    for timing in timings:
        case, size = timing.case, job.size
        if case.variant in CEILING_NAMES:
            continue
        low, median, high = (float(s) for s in np.percentile(timing.seconds, (10, 50, 90)))
        ceiling = rates[case.ceiling, case.count]
        limit = (row.busbw(size) if case.ceiling == SOCKET else row.traffic(size)) * case.bytes / ceiling
        algbw = case.bytes / median * 1e-9
        rows.append({
            "bytes": case.bytes, "count": case.count, "dtype": job.dtype.name, "peer": case.peer, "variant": case.variant,
            "time_us": median * 1e6, "p10_us": low * 1e6, "p90_us": high * 1e6,
            "algbw": algbw, "busbw": algbw * row.busbw(size),
            "copy_GBs": rates["copy", case.count] * 1e-9, "ceiling_GBs": ceiling * 1e-9,
            "limit_us": limit * 1e6, "percent_of_limit": 100 * limit / median, "ratios": {},
            "repetitions": len(timing.seconds),
        })  # fmt: skip
    for mine in (r for r in rows if r["peer"] is None):
        mine["ratios"] = ratios(mine, [r for r in rows if r["peer"] is not None and r["count"] == mine["count"]])
    return rows


def ratios(mine: dict, theirs: list[dict]) -> dict[str, float]:
    """By peer. Private buffers are compared with private ones where the peer has both forms, the arena with its better one."""
    found = {}
    for peer in dict.fromkeys(r["peer"] for r in theirs):
        forms = {r["variant"]: r["time_us"] for r in theirs if r["peer"] == peer}
        best = min(forms.values())
        found[peer] = (best if mine["variant"] == "arena" else forms.get("private", best)) / mine["time_us"]
    return found


def summarize(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Geometric mean over all sizes, by variant of ours, of the ratio to the best MPI ("mpi") and to each peer."""
    summary: dict[str, dict[str, float]] = {}
    ours = [row for row in rows if row["ratios"]]
    for variant in dict.fromkeys(row["variant"] for row in ours):
        found: dict[str, list[float]] = {}
        for row in (r for r in ours if r["variant"] == variant):
            mpi = [ratio for peer, ratio in row["ratios"].items() if peer in peers.MPI]
            for name, ratio in (({"mpi": min(mpi)} if mpi else {}) | row["ratios"]).items():
                found.setdefault(name, []).append(ratio)
        summary[variant] = {name: float(np.exp(np.mean(np.log(values)))) for name, values in found.items()}
    return summary


def about_peers(teams: list[peers.Team], notes: dict[str, str]) -> dict[str, dict]:
    """What the peers are; rank 0's word for all. notes: of those that have not started."""
    found = {name: dict.fromkeys(PEER_FIELDS) | {"note": note} for name, note in notes.items()}
    for team in teams:
        found[team.peer.name] = {name: team.hello[name] for name in PEER_FIELDS if name != "note"} | {"note": team.note}
    return found


def make_document(
    row: Collective, job: Job, rows: list[dict], about: dict[str, dict] | None = None, limit: str = MEMORY
) -> dict:
    """about: about_peers(). limit: what the rows are compared with, in words."""
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
        "limit": limit,
        "peers": about or {},
        "summary": summarize(rows),
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
    for name, peer in document["peers"].items():
        _need(peer, PEER_FIELDS, f"peer {name}")
    for i, row in enumerate(document["rows"]):
        _need(row, ROW_FIELDS, f"row {i}")
        strange = row["ratios"].keys() - document["peers"].keys()
        if strange or not all(isinstance(ratio, float) and ratio > 0 for ratio in row["ratios"].values()):
            raise ValueError(f"row {i}: ratios is {row['ratios']}")


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


def label(row: dict) -> str:
    """Our variant, or the peer and, where it has more than one form, which."""
    return row["variant"] if row["peer"] is None else row["peer"] + (" in place" if row["variant"] == "in_place" else "")


def table(document: dict) -> str:
    """The rows as text, under what they were measured on, over the summary."""
    d, box = document, document["machine"]
    what = d["benchmark"] + (f" ({d['op']})" if d["op"] else "")
    where = f"{d['ranks']} rank(s) on {d['hosts']} host(s), transport {d['transport']}"
    lines = [
        f"# {what}, {where}, {d['isa']}; {box['cpu']}, {box['cores']} cores",
        f"# median of {d['rows'][0]['repetitions']} repetitions; GB/s of 10^9 bytes; limit: {d['limit']}",
    ]
    for name, peer in d["peers"].items():
        about = [f"{peer['library']}, {peer['cores']} core(s) for each rank, {peer['scheduler']}"] if peer["library"] else []
        lines.append(f"# {name}: {'; '.join(about + [peer['note']] * bool(peer['note']))}")
    if d["summary"]:
        lines.append("# x NAME: that peer's time / ours; above 1, we are faster")
    names = [name for name, peer in d["peers"].items() if peer["library"]]
    width = max(8, *(len(label(row)) for row in d["rows"]))
    columns = [(name, form, width if name == "variant" else w) for name, form, w in COLUMNS]
    lines.append("  ".join([f"{TITLES.get(name, name):>{w}}" for name, _, w in columns] + [f"{'x ' + n:>9}" for n in names]))
    for row in d["rows"]:
        cells = [f"{form.format((row | {'variant': label(row)})[name]):>{w}}" for name, form, w in columns]
        if row["peer"] is None:
            cells += [f"{format(row['ratios'][n], '.2f') if n in row['ratios'] else '-':>9}" for n in names]
        lines.append("  ".join(cells))
    for variant, means in d["summary"].items():
        parts = [f"{'the best MPI' if name == 'mpi' else name} {mean:.2f}" for name, mean in means.items()]
        lines.append(f"# {variant}, geometric mean of all sizes: x {', x '.join(parts)}")
    return "\n".join(lines)


def plot(document: dict, path: str) -> None:
    """Time and bus bandwidth against size, one line for each variant, with its limit. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = bool(document["summary"])
    figure, axes = pyplot.subplots(1, 2 + compared, figsize=(11 + 5.5 * compared, 4.2), layout="constrained")
    left, right = axes[:2]
    rows = document["rows"]
    for variant in dict.fromkeys(label(row) for row in rows):
        mine = [row for row in rows if label(row) == variant]
        sizes = [row["bytes"] for row in mine]
        line = left.plot(sizes, [row["time_us"] for row in mine], marker=".", label=variant)
        left.fill_between(sizes, [r["p10_us"] for r in mine], [r["p90_us"] for r in mine], alpha=0.2, color=line[0].get_color())
        right.plot(sizes, [row["busbw"] for row in mine], marker=".", label=variant)
        if mine[0]["peer"] is not None:
            continue
        for peer in mine[0]["ratios"]:
            axes[2].plot(sizes, [row["ratios"][peer] for row in mine], marker=".", label=f"{variant}: {peer}")
        limited = [row for row in mine if row["limit_us"] > 0]
        dashed = {"linestyle": "--", "color": line[0].get_color(), "label": f"limit of {variant}"}
        left.plot([row["bytes"] for row in limited], [row["limit_us"] for row in limited], **dashed)
        right.plot([row["bytes"] for row in limited], [r["busbw"] * r["time_us"] / r["limit_us"] for r in limited], **dashed)
    titles = ("time of a call, us (p10 to p90)", "bus bandwidth, GB/s", "time of the peer / ours (above 1: we are faster)")
    for one, title in zip(axes, titles, strict=False):
        one.set(xscale="log", xlabel="bytes", ylabel=title)
        one.grid(alpha=0.3)
        one.legend(fontsize="small")
    left.set_yscale("log")
    if compared:
        axes[2].set_yscale("log")
        axes[2].axhline(1, color="black", linewidth=0.8)
    d = document
    figure.suptitle(f"{d['benchmark']}, {d['ranks']} rank(s), {d['transport']}, {d['machine']['cpu']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
