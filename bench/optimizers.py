"""`python -m bench optimizers`: a step of the fused optimizers beside torch's, on one process's CPU threads.

Layouts: the same number of parameters as one tensor (A), as ResNet-50's list of 161 (B), as 1,000 (C); and 1,000 of 16 (S).
Every library gets its own copies of the same numbers; before timing all take the same steps and must agree. Then they take
turns. A row's ratio is the peer's median divided by ours: above 1, we are faster. The limit is a loop in place with the same
traffic of memory (roof.c), in the same run and turns.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import roundel
import torch
from roundel import _core
from roundel.optim import AdamW, LossScaler, RMSprop

from bench.report import SCHEMA, machine

COUNT = 10_000_000
STEPS_TO_AGREE = 3
BATCH_SECONDS = 2e-3
AWAITED_SECONDS = 300
SPIN_SECONDS = 0.02
SCALE, MAX_NORM = 2.0**10, 1.0
ROOF = "memory roof"
Step = Callable[[], object]


# ----- what is stepped


def resnet_shapes(count: int) -> list[tuple[int, ...]]:
    """ResNet-50's 161 tensors, narrowed or widened to about `count` elements."""

    def shapes(width: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [(width, 3, 7, 7), (width,), (width,)]
        inputs = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            planes = width * 2**stage
            for block in range(blocks):
                convolutions = [(planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
                if block == 0:
                    convolutions.append((4 * planes, inputs, 1, 1))
                for shape in convolutions:
                    found += [shape, shape[:1], shape[:1]]
                inputs = 4 * planes
        return [*found, (1000, inputs), (1000,)]

    def elements(width: int) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes(width))

    return shapes(min(range(1, 129), key=lambda width: abs(elements(width) - count)))


LAYOUTS: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
    "A": lambda count: [(count,)],
    "B": resnet_shapes,
    "C": lambda count: [(count // 1000,)] * 1000,
    "S": lambda count: [(16,)] * 1000,
}
TITLES = {"A": "one tensor", "B": "ResNet-50's 161", "C": "1,000 tensors", "S": "1,000 of 16"}


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, scale: float = 1.0) -> list[torch.nn.Parameter]:
    """The same random parameters with gradients whenever called."""
    random = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=random).mul_(0.1).to(dtype))
        p.grad = torch.randn(shape, generator=random).mul_(0.01 * scale).to(dtype)
        params.append(p)
    return params


# ----- who steps it: each returns what a step is, and the parameters that it changes


@dataclass
class Peer:
    """A library's way to take the step."""

    step: Step
    params: list[torch.Tensor]


HYPER = {"lr": 1e-3, "weight_decay": 0.01}
TORCH_WAYS = {
    "torch for-loop": {"foreach": False, "fused": False},
    "torch foreach": {"foreach": True},
    "torch fused": {"fused": True},
}


def deepspeed_adam() -> type | None:
    """DeepSpeed's CPUAdam, where it is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


def adamw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Peer]:
    """AdamW with everything in one dtype."""
    params = tensors(shapes, dtype)
    found = {"roundel": Peer(AdamW(params, **HYPER).step, params)}
    for name, way in TORCH_WAYS.items():
        params = tensors(shapes, dtype)
        found[name] = Peer(torch.optim.AdamW(params, **HYPER, **way).step, params)
    deepspeed = deepspeed_adam() if dtype == torch.float32 else None
    if deepspeed is not None:
        params = tensors(shapes, dtype)
        found["DeepSpeed CPUAdam"] = Peer(deepspeed(params, **HYPER, adamw_mode=True).step, params)
    return found


def rmsprop(shapes: list[tuple[int, ...]]) -> dict[str, Peer]:
    """float32 RMSprop; torch has no fused one."""
    params = tensors(shapes, torch.float32)
    found = {"roundel": Peer(RMSprop(params, lr=1e-3).step, params)}
    for name in ("torch for-loop", "torch foreach"):
        params = tensors(shapes, torch.float32)
        found[name] = Peer(torch.optim.RMSprop(params, lr=1e-3, foreach="foreach" in name).step, params)
    return found


def masters(shapes: list[tuple[int, ...]]) -> dict[str, Peer]:
    """bfloat16 parameters and gradients, AdamW on float32 masters, result rounded into the parameters."""
    params = tensors(shapes, torch.bfloat16)
    found = {"roundel": Peer(AdamW(params, **HYPER, master_weights=True).step, params)}
    for name, way in TORCH_WAYS.items():
        found[name] = _torch_masters(tensors(shapes, torch.bfloat16), way)
    return found


def _torch_masters(
    params: list[torch.nn.Parameter],
    way: dict,
    step_of: Callable[[torch.optim.Optimizer], Step] = lambda optimizer: optimizer.step,
) -> Peer:
    """The usual recipe, with torch's multi-tensor copies where it has some: cast up, step, cast down."""
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    for w in wide:
        w.grad = torch.empty_like(w)
    grads, wide_grads = [p.grad for p in params], [w.grad for w in wide]
    update = step_of(torch.optim.AdamW(wide, **HYPER, **way))

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(wide_grads, grads)
        update()
        torch._foreach_copy_(params, wide)

    return Peer(step, params)


def whole(shapes: list[tuple[int, ...]]) -> dict[str, Peer]:
    """float16: unscale, look for infinities, clip, AdamW on float32 masters, cast."""
    params = tensors(shapes, torch.float16, SCALE)
    optimizer = AdamW(params, **HYPER, master_weights=True, max_norm=MAX_NORM)
    scaler = LossScaler(init_scale=SCALE)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    found = {"roundel": Peer(step, params)}
    for name, way in TORCH_WAYS.items():
        found[name] = _torch_masters(tensors(shapes, torch.float16, SCALE), way, _scaled_step)
    return found


def _scaled_step(optimizer: torch.optim.Optimizer) -> Step:
    """As torch's documentation has it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))  # makes it begin
    wide = optimizer.param_groups[0]["params"]

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(wide, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return step


WORKLOADS: dict[str, tuple[str, Callable[[list], dict[str, Peer]]]] = {
    "adamw": ("float32 AdamW", lambda shapes: adamw(shapes, torch.float32)),
    "adamw-bf16": ("bfloat16 AdamW", lambda shapes: adamw(shapes, torch.bfloat16)),
    "rmsprop": ("float32 RMSprop", rmsprop),
    "masters": ("bfloat16 AdamW with float32 masters", masters),
    "whole": ("float16: unscale, check, clip, AdamW on masters, cast", whole),
}


# ----- time


def agree(peers: dict[str, Peer], where: str) -> None:
    """All take the same steps. Raises SystemExit for one that ends elsewhere."""
    for peer in peers.values():
        for _ in range(STEPS_TO_AGREE):
            peer.step()
    ours = peers["roundel"].params
    for name, peer in peers.items():
        for p, q in zip(ours, peer.params, strict=True):
            eps = torch.finfo(p.dtype).eps
            if not torch.allclose(p.float(), q.float(), rtol=4 * eps, atol=4 * eps * 0.1):
                raise SystemExit(f"bench: {where}: {name} and roundel differ by {(p.float() - q.float()).abs().max():.1e}")


def seconds_by_peer(
    peers: dict[str, Step], repetitions: int, apart: tuple[float, float] = (0, math.inf)
) -> tuple[dict[str, list[float]], list[float]]:
    """Times of a step: batches in turn, each after an untimed step, as long as they must be to last BATCH_SECONDS. And round
    trips between two threads, one before each turn: a virtual machine may move. Turns that do not begin and end with a round
    trip of `apart` nanoseconds do not count."""
    calls = {name: max(1, math.ceil(BATCH_SECONDS / batch(step, 1))) for name, step in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    round_trips = []
    gc.collect()
    gc.disable()
    try:
        before = await_distance(apart)
        while len(round_trips) < repetitions:
            turn = {name: batch(step, calls[name]) for name, step in peers.items()}
            after = round_trip()
            if fits(after, apart):
                round_trips.append(before)
                for name, value in turn.items():
                    seconds[name].append(value)
            before = after if fits(after, apart) else await_distance(apart)
    finally:
        gc.enable()
    return seconds, round_trips


def batch(step: Step, calls: int) -> float:
    """Seconds that one of `calls` steps takes. The one before them ends what the last library's threads still do, and fetches
    what is small into the caches."""
    step()
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


# The arrays of each loop of roof.c; the others have no limit.
ROOFS = {
    "adamw": [torch.float32] * 4,
    "rmsprop": [torch.float32] * 3,
    "whole": [torch.float32, torch.float16, torch.float32, torch.float32, torch.float16],
}


@functools.cache
def roof_library() -> ctypes.CDLL:
    """roof.c, built. Needs a C compiler."""
    directory = tempfile.mkdtemp()
    library = Path(directory) / "roof.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    try:
        subprocess.run([*compiler, *flags, "-o", library, Path(__file__).with_name("roof.c")], check=True)
        loaded = ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(directory)
    loaded.round_trip.restype = ctypes.c_double
    return loaded


def round_trip() -> float:
    """Seconds that a cache line takes from one thread to another and back; nan where there is one processor for both."""
    seconds = roof_library().round_trip() if len(os.sched_getaffinity(0)) > 1 else math.nan
    time.sleep(SPIN_SECONDS)  # its second thread spins on for a moment: not beside the first library to be timed
    return seconds


def fits(seconds: float, apart: tuple[float, float]) -> bool:
    return not (seconds * 1e9 < apart[0] or seconds * 1e9 > apart[1])


def await_distance(apart: tuple[float, float]) -> float:
    """The round trip, once it is as long as wanted. Raises SystemExit when it is not for AWAITED_SECONDS."""
    end = time.monotonic() + AWAITED_SECONDS
    while not fits(seconds := round_trip(), apart):
        if time.monotonic() > end:
            raise SystemExit(f"bench: threads were {seconds * 1e9:.0f} ns apart for {AWAITED_SECONDS} s, never {apart}")
        time.sleep(0.1)
    return seconds


def roof(workload: str, count: int) -> Step:
    """A pass of roof.c over arrays of `count`, on as many threads as torch has then."""
    run = getattr(roof_library(), workload)
    arrays = [torch.ones(count, dtype=dtype) for dtype in ROOFS[workload]]
    run.argtypes = [*[ctypes.c_void_p] * len(arrays), ctypes.c_size_t, ctypes.c_int]

    def step() -> None:
        run(*(a.data_ptr() for a in arrays), count, torch.get_num_threads())

    return step


def rows_of(
    workload: str, layout: str, threads: int, shapes: list, seconds: dict[str, list[float]], round_trips: list[float]
) -> list[dict]:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    known = [one for one in round_trips if not math.isnan(one)]
    rows = []
    for name, values in seconds.items():
        ordered = sorted(values)
        rows.append({
            "workload": workload,
            "layout": layout,
            "tensors": len(shapes),
            "count": count,
            "threads": threads,
            "peer": None if name == "roundel" else name,
            "time_us": medians[name] * 1e6,
            "p10_us": ordered[len(ordered) // 10] * 1e6,
            "p90_us": ordered[len(ordered) * 9 // 10] * 1e6,
            "ratio": medians[name] / medians["roundel"],
            "repetitions": len(values),
            "round_trip_ns": statistics.median(known) * 1e9 if known else None,
        })  # fmt: skip
    return rows


def measure(options: argparse.Namespace) -> list[dict]:
    rows = []
    for workload in options.workloads:
        for layout in options.layouts:
            shapes = LAYOUTS[layout](options.count)
            peers = WORKLOADS[workload][1](shapes)
            agree(peers, f"{workload}, layout {layout}")
            steps = {name: peer.step for name, peer in peers.items()}
            if workload in ROOFS and layout != "S":
                steps[ROOF] = roof(workload, options.count)
            for threads in options.threads:
                torch.set_num_threads(threads)
                seconds, round_trips = seconds_by_peer(steps, options.repetitions, options.apart)
                found = rows_of(workload, layout, threads, shapes, seconds, round_trips)
                rows += found
                print(table(found), flush=True)
    return rows


# ----- what comes out


def table(rows: list[dict]) -> str:
    """The rows of one workload, layout and number of threads."""
    first = rows[0]
    title = f"{WORKLOADS[first['workload']][0]}, {TITLES[first['layout']]}, {first['count']:,} parameters, "
    apart = f"{first['round_trip_ns']:.0f} ns apart, " if first["round_trip_ns"] and first["threads"] > 1 else ""
    lines = [title + f"{first['threads']} thread(s), {apart}median of {first['repetitions']}"]
    for row in rows:
        spread = f"{row['p10_us']:11.1f}{row['p90_us']:11.1f}"
        lines.append(f"  {row['peer'] or 'roundel':20}{row['time_us']:11.1f} us{spread}{row['ratio']:9.2f} x")
    return "\n".join(lines)


def document(rows: list[dict]) -> dict:
    """All rows and what they depend on."""
    return {
        "schema": SCHEMA,
        "benchmark": "optimizers",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "isa": _core.info()["isa"],
        "versions": {"roundel": roundel.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }


def plot(rows: list[dict], path: str) -> None:
    """Ratios to each peer, a panel for each workload and number of threads. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers, workloads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("threads", "workload"))
    size = (3.4 * len(workloads), 3.6 * len(numbers))
    figure, axes = pyplot.subplots(len(numbers), len(workloads), figsize=size, squeeze=False, layout="constrained")
    for axis, (threads, workload) in zip(axes.flat, itertools.product(numbers, workloads), strict=True):
        mine = [row for row in rows if (row["threads"], row["workload"]) == (threads, workload) and row["peer"]]
        names, layouts = list(dict.fromkeys(r["peer"] for r in mine)), list(dict.fromkeys(r["layout"] for r in mine))
        for i, name in enumerate(names):
            those = [row for row in mine if row["peer"] == name]
            where = [layouts.index(row["layout"]) + (i + 0.5) * 0.8 / len(names) - 0.4 for row in those]
            axis.bar(where, [row["ratio"] for row in those], 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(layouts)), [TITLES[layout] for layout in layouts], fontsize="x-small")
        axis.set(yscale="log", title=f"{workload}, {threads} thread(s)", ylabel="time of the peer / ours")
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench optimizers", description=__doc__.splitlines()[0], allow_abbrev=False)

    def several(known, kind=str):
        def convert(text: str) -> list:
            try:
                found = [kind(part) for part in text.split(",")]
            except ValueError:
                found = [None]
            if known is not None and any(one not in known for one in found):
                raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(map(str, known))}")
            return found

        return convert

    def distances(text: str) -> tuple[float, float]:
        low, dash, high = text.partition("-")
        if not (dash and low.isdigit() and high.isdigit() and int(low) < int(high)):
            raise argparse.ArgumentTypeError(f"{text!r} is not LOW-HIGH in ns")
        return float(low), float(high)

    add = parser.add_argument
    add("-t", dest="threads", type=several(range(1, 257), int), default=[1, 2], help="numbers of threads (default 1,2)")
    add("-n", dest="repetitions", type=int, default=15, help="repetitions (default 15)")
    add("-l", dest="layouts", type=several(LAYOUTS), default=list(LAYOUTS), help="of A,B,C,S (default all)")
    add(
        "-w", dest="workloads", type=several(WORKLOADS), default=list(WORKLOADS), help=f"of {','.join(WORKLOADS)} (default all)"
    )
    add("-c", dest="count", type=int, default=COUNT, help="parameters of A, B and C (default 10,000,000)")
    add(
        "--apart",
        type=distances,
        default=(0, math.inf),
        metavar="LOW-HIGH",
        help="count only turns while threads are so many ns apart",
    )
    add("--json", metavar="FILE", help="write the rows there")
    add("--plot", metavar="FILE.png", help="draw the rows there (needs matplotlib)")
    options = parser.parse_args(argv)
    if options.repetitions < 1 or options.count < 1000:
        parser.error("-n must be at least 1, -c at least 1000")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    rows = measure(options)
    if options.json:
        Path(options.json).write_text(json.dumps(document(rows), indent=1, allow_nan=False) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
