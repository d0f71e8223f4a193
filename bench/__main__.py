"""`python -m bench COLLECTIVE`: time a collective over a range of sizes; `python -m bench optimizers`. See bench/README.md."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys

import roundel
from roundel.launch import run as roundelrun
from roundel.launch.variables import OURS

from bench import hosts, peers, report
from bench.collectives import COLLECTIVES, Job
from bench.data import DTYPES, OPS
from bench.measure import WrongResult, make_cases, measure

ALIASES = {"half": "float16", "float": "float32", "double": "float64"}  # nccl-tests' names
LAUNCHERS = (*OURS, "RANK")  # a variable of one of them: somebody has started the ranks


def parse_bytes(text: str) -> int:
    """8, 64K, 1.5M, 1G: K, M and G are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    size = int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8, 64K, 1.5M or 1G")
    return size


def at_least(least: int):
    """An argparse type: a whole number from `least` on."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return convert


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time a collective over a range of sizes, check its results, compare with this machine's copy bandwidth.",
        epilog="example: python -m bench allreduce -np 2 -b 8 -e 64M -f 2 --arena",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("collective", choices=COLLECTIVES)
    add("-np", dest="ranks", metavar="N", type=at_least(1), help="start N ranks under roundelrun, where no launcher has")
    add("-b", dest="begin", metavar="BYTES", type=parse_bytes, default=8, help="smallest size (default 8)")
    add("-e", dest="end", metavar="BYTES", type=parse_bytes, default=parse_bytes("64M"), help="largest size (default 64M)")
    add("-f", dest="factor", metavar="N", type=at_least(2), default=2, help="from one size to the next (default 2)")
    add("-n", dest="repetitions", metavar="N", type=at_least(1), help="repetitions (default: about 10 s of them, 7 to 100)")
    add("-w", dest="warmup", metavar="N", type=at_least(0), default=1, help="untimed calls before each repetition (default 1)")
    add("-d", dest="dtype", metavar="DTYPE", type=lambda name: ALIASES.get(name, name), choices=DTYPES, default="float32",
        help=f"one of {', '.join(DTYPES)} (default float32)")  # fmt: skip
    add("-o", dest="op", choices=OPS, default="sum", help="of reductions (default sum)")
    add("--arena", action="store_true", help="also on buffers that the library allocates; all-reduce then works in place")
    add(
        "--peers",
        metavar="NAMES",
        help=f"time these libraries too, in turn with ours: {', '.join((*peers.GROUPS, *peers.PEERS))}",
    )
    add("--hosts", type=int, choices=(hosts.HOSTS,), help="a rank on each of two hosts made of network namespaces (needs root)")
    add("--rate", metavar="RATE", help="what each of --hosts may send, in tc's words, such as 1gbit (default: no limit)")
    add("--lab", metavar="FILE", help=argparse.SUPPRESS)  # --hosts tells its ranks so
    ways = ("auto", "shm", "tcp", "mpi", "shm+tcp", "shm+mpi")
    add("--transport", choices=ways, help="how ranks exchange data (ROUNDEL_TRANSPORT); mpi: under mpirun")
    add("--json", metavar="FILE", help="write the rows there")
    add("--plot", metavar="FILE.png", help="draw the rows there (needs matplotlib)")
    options = parser.parse_args(argv)
    if options.begin > options.end:
        parser.error(f"-b {options.begin} is more than -e {options.end}")
    if options.hosts is not None and options.ranks not in (None, options.hosts):
        parser.error(f"--hosts {options.hosts} has a rank on each: -np {options.hosts}")
    if options.rate and options.hosts is None:
        parser.error("--rate is of --hosts 2")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if options.dtype == "bfloat16" and importlib.util.find_spec("torch") is None:
        parser.error("-d bfloat16 needs torch, which is not installed: numpy has no bfloat16")
    if options.peers is not None:
        try:
            peers.find(options.peers)
        except peers.PeerError as error:
            parser.error(f"--peers: {error}")
    return options


def counts(begin: int, end: int, factor: int, itemsize: int, multiple: int) -> list[int]:
    """Elements at each size, rounded down to a multiple; sizes that hold none are left out."""
    found, size = [], begin
    while size <= end:
        found.append(size // itemsize // multiple * multiple)
        size *= factor
    return [count for count in dict.fromkeys(found) if count > 0]


def main(argv: list[str]) -> int:
    if argv[:1] == ["optimizers"]:
        from bench import optimizers  # needs torch

        return optimizers.main(argv[1:])
    options = parse(argv)
    if options.hosts is not None and options.lab is None:
        return hosts.run(argv, options.rate)
    if options.ranks is not None and not any(name in os.environ for name in LAUNCHERS):
        return roundelrun.main(["-np", str(options.ranks), "--no-prefix", "--", sys.executable, "-m", "bench", *argv])
    if options.transport:
        os.environ["ROUNDEL_TRANSPORT"] = options.transport
    roundel.init()
    comm = roundel.communicator()
    if options.ranks not in (None, comm.size):
        print(f"bench: -np {options.ranks}, but the launcher has started {comm.size} ranks", file=sys.stderr)
        return 2
    row, job = COLLECTIVES[options.collective], Job(comm, DTYPES[options.dtype], options.op)
    sizes = counts(options.begin, options.end, options.factor, job.dtype.storage.itemsize, job.size if row.divides else 1)
    if not sizes:
        print(f"bench: no size from {options.begin} to {options.end} holds {job.size} elements", file=sys.stderr)
        return 2
    variants = ["private", "arena"] if options.arena else ["private"]
    lab, link, limit = None, None, report.MEMORY
    if options.lab is not None:
        lab = hosts.read_lab(options.lab)
        link = hosts.ceiling(hosts.connect(comm, lab))
        limit = f"a raw socket, both ways at once, {options.rate or 'no rate limit'}"
    try:
        with peers.started(options.peers or "", row, job, max(sizes), lab) as (teams, notes):
            cases = make_cases(row, job, sizes, variants, teams, link)
            timings = measure(job, cases, options.repetitions, options.warmup)
            about = report.about_peers(teams, notes)
    except (WrongResult, peers.PeerError) as error:
        if str(error):
            print(f"bench: {error}", file=sys.stderr, flush=True)
        return 1
    if comm.rank == 0:
        document = report.make_document(row, job, report.make_rows(row, job, timings), about, limit)
        print(report.table(document), flush=True)
        if options.json:
            report.write_json(document, options.json)
        if options.plot:
            report.plot(document, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
